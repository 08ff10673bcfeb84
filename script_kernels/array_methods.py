"""Selection rules by name on NumPy arrays: those of `script_kernels.methods` that are made of the ops, without PyTorch.

Names, options and errors are those of `script_kernels.methods`, which has the formulas. What a rule does besides its
ops is arithmetic on the rows and the relevance that go in, and sorting of the indices that come out.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import array_focus, arrays
from .array_focus import good_rows, unit
from .numpy import gsp as graph_pruning
from .numpy import mask_intersect, max_min, qcsp
from .numpy import mmr as marginal_relevance
from .options import (
    COMBINE,
    Grids,
    GspOptions,
    PruneOptions,
    check_grids,
    check_split,
    checker_order,
    count,
    number,
    rounds_needed,
    share_given,
    survivors_of,
    union_share,
)

Array = npt.NDArray[Any]
Method = Callable[..., Array]
Weighted = tuple[Array, Array, float]  # rows, relevance and power: what `qcsp` makes a kernel of


def check(tokens: Array, relevance: Array | None, keep: int) -> tuple[Array, Array | None, int]:
    """The arguments that every method takes, or a ValueError or TypeError."""
    tokens = arrays.tokens(tokens)
    relevance = None if relevance is None else arrays.relevance(relevance, tokens)
    return tokens, relevance, arrays.count(keep, "keep", tokens.shape[1], "N")


def ones(tokens: Array) -> Array:
    return np.ones(tokens.shape[:2], np.float32)


def top(score: Array, keep: int) -> Array:
    """The `keep` tokens of largest score (B, N), ascending; between equals the lower index."""
    return np.sort(np.argsort(-score, axis=1, kind="stable")[:, :keep], 1)


def split_order(n: int, split: str, grid_width: int | None) -> Array | None:
    """(n,) int64: the tokens in an order whose even places are GSP's first sources; None: as they come."""
    check_split(n, split, grid_width)
    if grid_width is None or grid_width % 2:
        return None
    order: Array = checker_order(np.arange(n, dtype=np.int64), grid_width)
    return order


def weighted(tokens: Array, relevance: Array | None, power: float, mix: float, floor: float, negate: bool) -> Weighted:
    """What gives `qcsp` the kernel (1 - mix) S + mix diag(p) S diag(p), p = (floor + (1 - floor) r)^power."""
    power, mix, floor = (
        number(power, "power", 0.0, 64.0),
        number(mix, "mix", 0.0, 1.0),
        number(floor, "floor", 0.0, 1.0),
    )
    if relevance is None:
        return tokens, ones(tokens), 1.0
    r = np.float32(1) - relevance if negate else relevance
    if floor or power != 1:
        r = np.maximum(np.float32(floor) + np.float32(1 - floor) * r, np.float32(0))
    if mix == 1:
        return tokens, r, power
    r, x = r ** np.float32(power), unit(tokens)
    rows = np.concatenate([np.float32(math.sqrt(1 - mix)) * x, np.float32(math.sqrt(mix)) * r[..., None] * x], -1)
    rows[~good_rows(tokens)[0]] = np.nan  # such tokens go last, as they would as they came
    return rows, np.sqrt(np.float32(1 - mix) + np.float32(mix) * r * r), 1.0


def ranking(kernel: Weighted, k: int, ridge: float, threads: int) -> Array:
    rows, relevance, power = kernel
    return qcsp(rows, relevance, k, power=power, ridge=number(ridge, "ridge", 0.0), threads=threads)[0]


def script(
    tokens: Array,
    relevance: Array | None,
    keep: int,
    *,
    power: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    negate: bool = False,
    ridge: float = 0.0,
    combine: str = "intersect",
    survivors: float | None = None,
    split: str = "raster",
    grid_width: int | None = None,
    threads: int = 1,
    **options: Any,
) -> Array:
    """QCSP's ranking and GSP's survivors, joined by `combine`; see `script_kernels.methods`."""
    if combine not in COMBINE:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
    if "reduce" in options:
        raise TypeError("reduce: expected in `query_relevance`, got it in a method, which is given the relevance")
    given = PruneOptions(combine=combine, **options)
    given.check()
    where = split_order(tokens.shape[1], split, grid_width)
    if where is not None:
        tokens, relevance = tokens[:, where], None if relevance is None else relevance[:, where]
    kernel = weighted(tokens, relevance, power, mix, floor, negate)
    kept = _joined(tokens, kernel, keep, given, survivors, ridge, threads)
    return np.sort(kept if where is None else where[kept], 1)


def _joined(
    tokens: Array, kernel: Weighted, keep: int, given: PruneOptions, survivors: float | None, ridge: float, threads: int
) -> Array:
    """(B, keep) indices of the tokens that GSP and QCSP choose together."""
    n = tokens.shape[1]
    graph: dict[str, Any] = {name: getattr(given, name) for name in ("threshold", "gamma", "min_degree")}
    if given.combine == "union":
        left = union_share(keep)
        rounds = max(given.rounds, rounds_needed(n, left))
    elif survivors is None:
        given.check_drop(n, keep)
        left, rounds = given.gsp_keep(n), given.rounds
    else:
        left = survivors_of(n, keep, survivors)
        rounds = max(given.rounds, rounds_needed(n, left))
    mask, _ = graph_pruning(tokens, left, rounds=rounds, threads=threads, **graph)
    if given.combine == "intersect":
        return mask_intersect(ranking(kernel, given.ranked(n, keep), ridge, threads), mask, keep, threads=threads)
    if given.combine == "union":
        # GSP's own first, then the order's others: together they are a ranking of which the first are kept.
        order = ranking(kernel, keep, ridge, threads)
        key = np.where(mask, 0, 2 * n)
        place = np.where(np.take_along_axis(mask, order, 1), 0, n + np.arange(keep))
        np.put_along_axis(key, order, place, 1)
        return np.argsort(key, 1, kind="stable")[:, :keep]
    if left < keep:
        raise ValueError(f"keep: expected keep <= {left}, which gsp_drop leaves to 'restrict', got {keep}")
    where = np.argsort(~mask, 1, kind="stable")[:, :left]
    rows, relevance, power = kernel
    own = np.take_along_axis(rows, where[..., None], 1), np.take_along_axis(relevance, where, 1), power
    return np.take_along_axis(where, ranking(own, keep, ridge, threads), 1)


def focus(
    tokens: Array,
    relevance: Array | None,
    keep: int,
    *,
    least: float = 0.5,
    most: float = 0.625,
    typical: float = 0.125,
    near: int = 2,
    negate: bool = False,
    floor: float = 0.3,
    survivors: float = 2.0,
    above: Array | None = None,
    grids: Grids | None = None,
    threads: int = 1,
) -> Array:
    """A share where the question points, typical tokens, and the rest by `script`; see `script_kernels.methods`."""
    n = tokens.shape[1]
    whole = share_given(keep / n, least, most, typical, near)
    if grids is not None:
        check_grids(grids, n)
    above = relevance if above is None else arrays.relevance(above, tokens, "above")
    survivors, restrict = number(survivors, "survivors", 1.0), PruneOptions(combine="restrict")
    if above is None or relevance is None or grids is None or whole == 0.0:
        kernel = weighted(tokens, relevance, 1.0, 1.0, floor, negate)
        return np.sort(_joined(tokens, kernel, keep, restrict, survivors, 0.0, threads), 1)
    above = np.float32(1) - above if negate else above
    taken = array_focus.shares(tokens, above, keep, (least, most, typical), near, whole, grids)
    # What is taken is like nothing, so that GSP leaves it alone, and comes last in QCSP's order.
    rest = tokens.copy()
    rest[taken] = 0
    kernel = weighted(rest, np.where(taken, np.float32(np.nan), relevance), 1.0, 1.0, floor, negate)
    survivors -= (survivors - 1) * (most + typical) * whole
    order = _joined(rest, kernel, keep, restrict, survivors, 0.0, threads)
    own = ~np.take_along_axis(taken, order, 1)
    picks = own & (own.cumsum(1) <= keep - taken.sum(1, keepdims=True))
    np.put_along_axis(taken, order, picks | ~own, 1)
    return taken.nonzero()[1].reshape(-1, keep)


def cdpruner(
    tokens: Array,
    relevance: Array | None,
    keep: int,
    *,
    power: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    negate: bool = False,
    ridge: float = 0.0,
    threads: int = 1,
) -> Array:
    """Greedy MAP with kernel diag(r) S diag(r); see `script_kernels.methods`."""
    return np.sort(ranking(weighted(tokens, relevance, power, mix, floor, negate), keep, ridge, threads), 1)


def dpp(tokens: Array, relevance: Array | None, keep: int, *, ridge: float = 0.0, threads: int = 1) -> Array:
    """Greedy MAP with kernel S."""
    return np.sort(ranking((tokens, ones(tokens), 1.0), keep, ridge, threads), 1)


def resprune(tokens: Array, relevance: Array | None, keep: int, *, alpha: float = 1.0, threads: int = 1) -> Array:
    """Greedy MAP on the raw rows r^(alpha / 2) x; see `script_kernels.methods`."""
    alpha = number(alpha, "alpha", 0.0, 64.0)
    r = ones(tokens) if relevance is None else np.maximum(relevance, np.float32(0))
    return np.sort(qcsp(tokens, r, keep, power=alpha / 2, normalize=False, threads=threads)[0], 1)


def otprune(tokens: Array, relevance: Array | None, keep: int, *, gamma: float = 0.01, threads: int = 1) -> Array:
    """Greedy log det(I + gamma G Gᵀ); see `script_kernels.methods`."""
    gamma = number(gamma, "gamma", 0.0)
    good, x = good_rows(tokens)
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    x = x / np.where(norm > 0, norm, np.float32(1))
    gram = np.where(good[..., None], x @ x.swapaxes(1, 2), np.float32(np.nan))  # such tokens go last
    weight = np.float32(math.sqrt(gamma)) * ones(gram)
    return np.sort(qcsp(gram, weight, keep, normalize=False, ridge=1.0, threads=threads)[0], 1)


def divprune(tokens: Array, relevance: Array | None, keep: int, *, threads: int = 1) -> Array:
    """Greedy max-min distance; see `script_kernels.numpy.max_min`."""
    return np.sort(max_min(tokens, None, keep, threads=threads)[0], 1)


def mmr(tokens: Array, relevance: Array | None, keep: int, *, balance: float = 0.5, threads: int = 1) -> Array:
    """Maximal marginal relevance; see `script_kernels.numpy.mmr`."""
    balance = number(balance, "balance", 0.0, 1.0)
    r = ones(tokens) if relevance is None else relevance
    return np.sort(marginal_relevance(tokens, r, keep, balance=balance, threads=threads)[0], 1)


def relevance(tokens: Array, relevance: Array | None, keep: int, *, negate: bool = False, threads: int = 1) -> Array:
    """The tokens of largest relevance (`negate`: of smallest); between equals the lower index."""
    score = ones(tokens) if relevance is None else -relevance if negate else relevance
    return top(np.where(good_rows(tokens)[0] & np.isfinite(score), score, np.float32(-np.inf)), keep)


def gsp(
    tokens: Array,
    relevance: Array | None,
    keep: int,
    *,
    rounds: int | None = None,
    split: str = "raster",
    grid_width: int | None = None,
    threads: int = 1,
    **options: Any,
) -> Array:
    """Script's graph stage alone, in as many rounds as it takes to get down to `keep` (`rounds`: at least so many)."""
    order = split_order(tokens.shape[1], split, grid_width)
    needed = rounds_needed(tokens.shape[1], keep)
    rounds = needed if rounds is None else max(needed, count(rounds, "rounds", 1))
    GspOptions(rounds=rounds, **options).check()
    mask, _ = graph_pruning(
        tokens if order is None else tokens[:, order], keep, rounds=rounds, threads=threads, **options
    )
    kept = mask.nonzero()[1].reshape(-1, keep)
    return kept if order is None else np.sort(order[kept], 1)


def stride(tokens: Array, relevance: Array | None, keep: int, *, threads: int = 1) -> Array:
    """Every N / keep-th token: the middles of `keep` equal parts of the sequence."""
    place = np.arange(keep, dtype=np.int64)
    return np.tile((2 * place + 1) * tokens.shape[1] // (2 * keep), (len(tokens), 1))


def random(tokens: Array, relevance: Array | None, keep: int, *, seed: int = 0, threads: int = 1) -> Array:
    """Chance, with a seed: the draws of PyTorch's generator, which are the low 24 bits of the Mersenne Twister's."""
    if count(seed, "seed", 0) >= 2**63:
        raise ValueError(f"seed: expected seed < 2**63, got {seed}")
    drawn = np.random.RandomState(seed % 2**32).randint(0, 2**32, tokens.shape[:2], np.uint32)
    return top((drawn & np.uint32(2**24 - 1)).astype(np.float32), keep)


METHODS: dict[str, Method] = {
    "script": script,
    "focus": focus,
    "cdpruner": cdpruner,
    "dpp": dpp,
    "resprune": resprune,
    "otprune": otprune,
    "divprune": divprune,
    "mmr": mmr,
    "relevance": relevance,
    "gsp": gsp,
    "stride": stride,
    "random": random,
}
ELSEWHERE = ("tome_drop", "dart", "released_script")  # in `script_kernels.methods`, which needs PyTorch


def select(
    tokens: Array, relevance: Array | None, keep: int, method: str | Method, threads: int, options: dict[str, Any]
) -> Array:
    """`script_kernels.numpy.select`."""
    if not isinstance(method, str) and not callable(method):
        raise TypeError(f"method: expected a name or a callable, got {type(method).__name__}")
    if isinstance(method, str) and method not in METHODS:
        where = ", which needs script_kernels.methods and PyTorch" if method in ELSEWHERE else ""
        raise ValueError(f"method: expected a callable or one of {', '.join(METHODS)}, got {method!r}{where}")
    tokens, relevance, keep = check(tokens, relevance, keep)
    threads = arrays.threads(threads)
    if not isinstance(method, str):
        return checked(method(tokens, relevance, keep, **options), tokens, keep)
    return METHODS[method](
        tokens, relevance, keep, threads=threads, **{name: arrays.real(value) for name, value in options.items()}
    )


def checked(kept: Array, tokens: Array, keep: int) -> Array:
    """What a callable returned, ascending, once it is known to be `keep` distinct indices of each image's tokens."""
    arrays.is_array(kept, "method")
    if kept.dtype not in (np.int64, np.int32):
        raise TypeError(f"method: expected it to return an int64 array, got {kept.dtype.name}")
    batch, n = tokens.shape[:2]
    if kept.shape != (batch, keep):
        raise ValueError(f"method: expected it to return shape ({batch}, {keep}), got {kept.shape}")
    kept = np.sort(kept.astype(np.int64), 1)
    if batch and (kept.min() < 0 or kept.max() >= n):
        raise ValueError(f"method: expected indices in 0..{n - 1}, got {kept.min()}..{kept.max()}")
    if (kept[:, 1:] == kept[:, :-1]).any():
        raise ValueError("method: expected distinct indices, got one twice")
    return kept


def options_of(method: str) -> dict[str, Any]:
    """Names and defaults of a method's own keywords."""
    parameters = inspect.signature(METHODS[method]).parameters.items()
    return {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY and name != "threads"}
