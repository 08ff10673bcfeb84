"""The ops on NumPy arrays, without PyTorch: for runtimes such as ONNX Runtime, OpenVINO or llama.cpp on edge devices.

Names, arguments and results are those of `script_kernels`; the same C++ cores run, so results are the same bit for bit
as those of the PyTorch ops on the CPU of the same machine. Arrays may be float32, float16 or bfloat16 (the `ml_dtypes`
type), in any strides. A call runs with the GIL released, on `threads` threads (default: the calling one alone); the
results do not depend on how many.

Bad arguments raise before any work: ValueError (values, shapes) or TypeError (dtypes, types), with a message
`argument: expected what, got what came`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays
from .options import REDUCE, GspOptions, QcspOptions, check_finite, check_keeps, check_name, check_share, check_split

try:
    from . import _core
except ImportError as error:
    raise ImportError(
        f"script_kernels.numpy needs the compiled module _core: {error}. "
        "To build it, run in the source tree: pip install --no-build-isolation -e ."
    ) from error

__all__ = [
    "bipartite_match",
    "dpp_map",
    "gsp",
    "mask_intersect",
    "max_min",
    "mmr",
    "prune",
    "prune_varlen",
    "qcsp",
    "query_relevance",
    "select",
]

Array = npt.NDArray[Any]


def query_relevance(
    tokens: Array,
    query: Array,
    query_mask: Array | None = None,
    *,
    negate: bool = False,
    reduce: str = "mean",
    threads: int = 1,
) -> Array:
    """Mean or largest cosine of each token with the query vectors, min-max scaled per image.

    Args:
        tokens: (B, N, C), tokens in the query's space.
        query: (B or 1, Q, C), Q >= 1, dtype of `tokens`.
        query_mask: (B or 1, Q) bool, True for the vectors that count; None: all.
        negate: flip the sign before the scaling.
        reduce: "mean" or "max" of the cosines.
        threads: how many threads the call may use, >= 1.

    Returns:
        (B, N) float32 in [0, 1].

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), CDPruner (arXiv 2506.10967).
    """
    tokens = arrays.tokens(tokens)
    query, query_mask = arrays.query(query, query_mask, tokens, tokens.shape[0], tokens.shape[2])
    check_name(reduce, "reduce", REDUCE)
    return _core.query_relevance(
        arrays.words(tokens), arrays.words(query), query_mask, bool(negate), reduce, arrays.threads(threads)
    )


def bipartite_match(
    tokens: Array, threshold: float = 0.2, *, threads: int = 1
) -> tuple[Array, Array, Array, Array, Array]:
    """What each source token (even position) sees of the destinations (odd); see `script_kernels.bipartite_match`.

    Args:
        tokens: (B, N, D).
        threshold: similarities from this on are edges.
        threads: how many threads the call may use, >= 1.

    Returns:
        best (float32), match (int32, the destination's token index, -1 without one), degree (int32), mean and density
        (float32), each (B, ceil(N / 2)).

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949); ToMe (arXiv 2210.09461).
    """
    tokens = arrays.tokens(tokens)
    threshold = arrays.real(threshold)
    check_finite(threshold, "threshold")
    return _core.bipartite_match(arrays.words(tokens), float(threshold), arrays.threads(threads))


def gsp(
    tokens: Array,
    keep: int,
    *,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    threads: int = 1,
) -> tuple[Array, Array]:
    """Drops the most redundant tokens of a bipartite graph until `keep` are left; see `script_kernels.gsp`.

    Args:
        tokens: (B, N, D).
        keep: 1 <= keep <= N tokens to keep, as far as `rounds` can reach: a round drops at most half.
        threshold, gamma, min_degree, rounds: the graph and its score.
        threads: how many threads the call may use, >= 1.

    Returns:
        mask (B, N) bool, True for kept tokens, and redundancy (B, N) float32, 0 for what never was a source.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), graph-structured pruning.
    """
    tokens = arrays.tokens(tokens)
    keep = arrays.count(keep, "keep", tokens.shape[1], "N")
    options = GspOptions(
        threshold=arrays.real(threshold),
        gamma=arrays.real(gamma),
        min_degree=arrays.whole(min_degree),
        rounds=arrays.whole(rounds),
    )
    options.check()
    options.check_reachable(tokens.shape[1], keep)
    return _core.gsp(
        arrays.words(tokens),
        keep,
        float(options.threshold),
        float(options.gamma),
        options.min_degree,
        options.rounds,
        arrays.threads(threads),
    )


def dpp_map(kernel: Array, k: int, *, threads: int = 1) -> tuple[Array, Array]:
    """Greedy MAP of a DPP given by its kernel; see `script_kernels.dpp_map`.

    Args:
        kernel: (B, N, N) float32, symmetric and positive semidefinite.
        k: 1 <= k <= N picks.
        threads: how many threads the call may use, >= 1.

    Returns:
        indices (B, k) int64 in greedy order, and gains (B, k) float32, the residual variance of each pick, 0 past the
        rank.

    Raises:
        ValueError, TypeError: see the module.

    Source: Chen et al. 2018 (arXiv 1709.05135).
    """
    kernel = arrays.array(kernel, "kernel", np.float32)
    if kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2]:
        raise ValueError(f"kernel: expected shape (B, N, N), got {kernel.shape}")
    return _core.dpp_map(kernel, arrays.count(k, "k", kernel.shape[1], "N"), arrays.threads(threads))


def qcsp(
    tokens: Array,
    relevance: Array,
    k: int,
    *,
    power: float = 1.0,
    normalize: bool = True,
    ridge: float = 0.0,
    threads: int = 1,
) -> tuple[Array, Array]:
    """Greedy MAP of the DPP with kernel L = diag(r) S diag(r) or one of its kin; see `script_kernels.qcsp`.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32.
        k: 1 <= k <= N picks.
        power, normalize, ridge: see `script_kernels.qcsp`.
        threads: how many threads the call may use, >= 1.

    Returns:
        indices (B, k) int64 in greedy order, and gains (B, k) float32, the residual variance of each pick, 0 past the
        rank.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949); Chen et al. 2018 (arXiv 1709.05135).
    """
    tokens = arrays.tokens(tokens)
    relevance = arrays.relevance(relevance, tokens)
    k = arrays.count(k, "k", tokens.shape[1], "N")
    options = QcspOptions(power=arrays.real(power), normalize=bool(normalize), ridge=arrays.real(ridge))
    options.check()
    kernel = float(options.power), options.normalize, float(options.ridge)
    return _core.qcsp(arrays.words(tokens), relevance, k, *kernel, arrays.threads(threads))


def max_min(tokens: Array, relevance: Array | None, k: int, *, threads: int = 1) -> tuple[Array, Array]:
    """Farthest points first, by relevance * (1 - cosine); see `script_kernels.max_min`.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32, or None: 1 for all.
        k: 1 <= k <= N picks.
        threads: how many threads the call may use, >= 1.

    Returns:
        indices (B, k) int64 in the order of picking, and gains (B, k) float32, what each pick was worth.

    Raises:
        ValueError, TypeError: see the module.

    Source: DivPrune (arXiv 2503.02175).
    """
    tokens = arrays.tokens(tokens)
    relevance = None if relevance is None else arrays.relevance(relevance, tokens)
    k = arrays.count(k, "k", tokens.shape[1], "N")
    return _core.max_min(arrays.words(tokens), relevance, k, arrays.threads(threads))


def mmr(tokens: Array, relevance: Array, k: int, *, balance: float = 0.5, threads: int = 1) -> tuple[Array, Array]:
    """Maximal marginal relevance: balance * r - (1 - balance) * largest cosine to a pick; see `script_kernels.mmr`.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32.
        k: 1 <= k <= N picks.
        balance: weight of the relevance, 0 <= balance <= 1.
        threads: how many threads the call may use, >= 1.

    Returns:
        indices (B, k) int64 in the order of picking, and gains (B, k) float32, the score of each pick.

    Raises:
        ValueError, TypeError: see the module.

    Source: Carbonell and Goldstein 1998.
    """
    tokens = arrays.tokens(tokens)
    relevance = arrays.relevance(relevance, tokens)
    k = arrays.count(k, "k", tokens.shape[1], "N")
    balance = arrays.real(balance)
    check_share(balance, "balance")
    return _core.mmr(arrays.words(tokens), relevance, k, float(balance), arrays.threads(threads))


def mask_intersect(ranking: Array, mask: Array, k: int, *, threads: int = 1) -> Array:
    """The first `k` of a ranking that are in a mask, filled up from the rest of the ranking.

    Args:
        ranking: (B, P) int64, best first, distinct indices in [0, N); P <= N.
        mask: (B, N) bool.
        k: 1 <= k <= P.
        threads: how many threads the call may use, >= 1.

    Returns:
        (B, k) int64, ascending.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), joint selection.
    """
    ranking = arrays.array(ranking, "ranking", np.int64)
    if ranking.ndim != 2:
        raise ValueError(f"ranking: expected shape (B, P), got {ranking.shape}")
    mask = arrays.array(mask, "mask", np.bool_)
    if mask.ndim != 2 or mask.shape[0] != ranking.shape[0]:
        raise ValueError(f"mask: expected shape ({ranking.shape[0]}, N), got {mask.shape}")
    if ranking.shape[1] > mask.shape[1]:
        raise ValueError(f"ranking: expected P <= N = {mask.shape[1]}, got P = {ranking.shape[1]}")
    k, threads = arrays.count(k, "k", ranking.shape[1], "P"), arrays.threads(threads)
    try:
        return _core.mask_intersect(ranking, mask, k, threads)
    except RuntimeError as error:  # entries that repeat or lie outside
        raise ValueError(str(error)) from None


def prune(
    tokens: Array,
    query: Array | None,
    keep: int,
    *,
    aligned: Array | None = None,
    query_mask: Array | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    floor: float = 0.0,
    power: float = 1.0,
    reduce: str = "mean",
    split: str = "raster",
    grid_width: int | None = None,
    threads: int = 1,
) -> Array:
    """Picks `keep` of the N tokens of each image, relevant to the query and not redundant; see `script_kernels.prune`.

    Args:
        tokens: (B, N, D).
        query: (B or 1, Q, C), or None: all tokens are equally relevant.
        keep: 1 <= keep <= N.
        aligned: (B, N, C), the tokens in the query's space; default `tokens`.
        query_mask: (B or 1, Q) bool.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce: see
            `script_kernels.prune`.
        split, grid_width: see `script_kernels.prune`.
        threads: how many threads the call may use, >= 1.

    Returns:
        (B, keep) int64, ascending.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949).

    >>> tokens = numpy.eye(4, dtype=numpy.float32)[None]
    >>> script_kernels.numpy.prune(tokens, None, 2)
    array([[0, 1]])
    """
    tokens = arrays.tokens(tokens)
    n = tokens.shape[1]
    keep = arrays.count(keep, "keep", n, "N")
    if query is None:
        aligned = query_mask = None
    else:
        if aligned is not None:
            aligned = arrays.array(aligned, "aligned", tokens.dtype)
            if aligned.ndim != 3 or aligned.shape[:2] != tokens.shape[:2] or aligned.shape[2] < 1:
                raise ValueError(
                    f"aligned: expected shape ({tokens.shape[0]}, {n}, C) with C >= 1, got {aligned.shape}"
                )
        width = (tokens if aligned is None else aligned).shape[2]
        query, query_mask = arrays.query(query, query_mask, tokens, tokens.shape[0], width)
    options = arrays.prune_options(
        negate=negate,
        gsp_drop=gsp_drop,
        oversample=oversample,
        combine=combine,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
        floor=floor,
        power=power,
        reduce=reduce,
    )
    grid_width = arrays.whole(grid_width)
    check_split(n, split, grid_width)
    options.check_drop(n, keep)
    return _core.prune(
        arrays.words(tokens),
        None if query is None else arrays.words(query),
        keep,
        None if aligned is None else arrays.words(aligned),
        query_mask,
        arrays.values(options),
        split,
        grid_width,
        arrays.threads(threads),
    )


def prune_varlen(
    tokens: Array,
    cu_seqlens: Array,
    query: Array | None,
    keep: Sequence[int],
    *,
    aligned: Array | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    floor: float = 0.0,
    power: float = 1.0,
    reduce: str = "mean",
    threads: int = 1,
) -> Array:
    """`prune` on segments of different lengths, packed behind each other; see `script_kernels.prune_varlen`.

    Args:
        tokens: (T, D).
        cu_seqlens: (S + 1,) int32, ascending from 0 to T: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        query: (S or 1, Q, C), or None: all tokens are equally relevant.
        keep: one count per segment, 1 <= keep[s] <= its length, 0 for an empty one.
        aligned: (T, C), the tokens in the query's space; default `tokens`.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce: see
            `script_kernels.prune`.
        threads: how many threads the call may use, >= 1.

    Returns:
        (sum(keep),) int64, indices into the packed tokens, ascending.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949).
    """
    tokens = arrays.tokens(tokens, "(T, D)")
    total = tokens.shape[0]
    cu_seqlens = arrays.array(cu_seqlens, "cu_seqlens", np.int32)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), got {cu_seqlens.shape}")
    segments = cu_seqlens.shape[0] - 1
    keep = [arrays.whole(kept) for kept in keep] if isinstance(keep, Sequence) else keep
    check_keeps(keep)
    if len(keep) != segments:
        raise ValueError(f"keep: expected one count per segment, S = {segments}, got {len(keep)} counts")
    if query is None:
        aligned = None
    else:
        if aligned is not None:
            aligned = arrays.array(aligned, "aligned", tokens.dtype)
            if aligned.ndim != 2 or aligned.shape[0] != total or aligned.shape[1] < 1:
                raise ValueError(f"aligned: expected shape ({total}, C) with C >= 1, got {aligned.shape}")
        width = (tokens if aligned is None else aligned).shape[1]
        query, _ = arrays.query(query, None, tokens, segments, width)
    options = arrays.prune_options(
        negate=negate,
        gsp_drop=gsp_drop,
        oversample=oversample,
        combine=combine,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
        floor=floor,
        power=power,
        reduce=reduce,
    )
    starts = cu_seqlens.tolist()
    options.check_segments(starts, total, keep)
    return _core.prune_varlen(
        arrays.words(tokens),
        starts,
        None if query is None else arrays.words(query),
        list(keep),
        None if aligned is None else arrays.words(aligned),
        arrays.values(options),
        arrays.threads(threads),
    )


def select(
    tokens: Array,
    relevance: Array | None,
    keep: int,
    *,
    method: str | Callable[..., Array] = "script",
    threads: int = 1,
    **options: Any,
) -> Array:
    """The indices that a method keeps; `script_kernels.methods.select` for the methods that are made of these ops.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32, or None.
        keep: 1 <= keep <= N.
        method: script, focus, cdpruner, dpp, resprune, otprune, divprune, mmr, relevance, gsp, stride, random, or a
            callable `(tokens, relevance, keep, **options) -> (B, keep)` integers, whose result is checked.
        threads: how many threads a method of these may use, >= 1; a callable is not told.
        options: handed on to the method.

    Returns:
        (B, keep) int64, ascending.

    Raises:
        ValueError, TypeError: see the module, and a callable's result that is not `keep` distinct indices.
    """
    from . import array_methods

    return array_methods.select(tokens, relevance, keep, method, threads, options)
