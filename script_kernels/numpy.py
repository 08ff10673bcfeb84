"""The ops on NumPy arrays, without PyTorch: for runtimes such as ONNX Runtime, OpenVINO or llama.cpp on edge devices.

Names, arguments and results are those of `script_kernels`; the same C++ cores run, so results are the same bit for bit
as those of the PyTorch ops on the CPU of the same machine. Arrays may be float32, float16 or bfloat16 (the `ml_dtypes`
type), in any strides. A call runs with the GIL released, on `threads` threads (default: the calling one alone); the
results do not depend on how many.

Bad arguments raise before any work: ValueError (values, shapes) or TypeError (dtypes, types), with a message
`argument: expected what, got what came`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .options import GspOptions, PruneOptions, check_finite, check_int, check_keeps, check_sizes

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
    "prune",
    "prune_varlen",
    "qcsp",
    "query_relevance",
]

Array = npt.NDArray[Any]


def query_relevance(
    tokens: Array, query: Array, query_mask: Array | None = None, *, negate: bool = False, threads: int = 1
) -> Array:
    """Mean cosine of each token with the query vectors, min-max scaled per image.

    Args:
        tokens: (B, N, C), tokens in the query's space.
        query: (B or 1, Q, C), Q >= 1, dtype of `tokens`.
        query_mask: (B or 1, Q) bool, True for the vectors that count; None: all.
        negate: flip the sign before the scaling.
        threads: how many threads the call may use, >= 1.

    Returns:
        (B, N) float32 in [0, 1].

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), CDPruner (arXiv 2506.10967).
    """
    tokens = _tokens(tokens)
    query, query_mask = _query(query, query_mask, tokens, tokens.shape[0], tokens.shape[2])
    return _core.query_relevance(_words(tokens), _words(query), query_mask, bool(negate), _threads(threads))


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
    tokens = _tokens(tokens)
    threshold = _real(threshold)
    check_finite(threshold, "threshold")
    return _core.bipartite_match(_words(tokens), float(threshold), _threads(threads))


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
    tokens = _tokens(tokens)
    keep = _count(keep, "keep", tokens.shape[1], "N")
    options = GspOptions(
        threshold=_real(threshold), gamma=_real(gamma), min_degree=_whole(min_degree), rounds=_whole(rounds)
    )
    options.check()
    options.check_reachable(tokens.shape[1], keep)
    return _core.gsp(
        _words(tokens),
        keep,
        float(options.threshold),
        float(options.gamma),
        options.min_degree,
        options.rounds,
        _threads(threads),
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
    kernel = _array(kernel, "kernel", np.float32)
    if kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2]:
        raise ValueError(f"kernel: expected shape (B, N, N), got {kernel.shape}")
    return _core.dpp_map(kernel, _count(k, "k", kernel.shape[1], "N"), _threads(threads))


def qcsp(tokens: Array, relevance: Array, k: int, *, threads: int = 1) -> tuple[Array, Array]:
    """Greedy MAP of the DPP with kernel L = diag(r) S diag(r); see `script_kernels.qcsp`.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32.
        k: 1 <= k <= N picks.
        threads: how many threads the call may use, >= 1.

    Returns:
        indices (B, k) int64 in greedy order, and gains (B, k) float32, the residual variance of each pick, 0 past the
        rank.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949); Chen et al. 2018 (arXiv 1709.05135).
    """
    tokens = _tokens(tokens)
    relevance = _array(relevance, "relevance", np.float32)
    if relevance.shape != tokens.shape[:2]:
        raise ValueError(f"relevance: expected shape {tokens.shape[:2]}, got {relevance.shape}")
    return _core.qcsp(_words(tokens), relevance, _count(k, "k", tokens.shape[1], "N"), _threads(threads))


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
    ranking = _array(ranking, "ranking", np.int64)
    if ranking.ndim != 2:
        raise ValueError(f"ranking: expected shape (B, P), got {ranking.shape}")
    mask = _array(mask, "mask", np.bool_)
    if mask.ndim != 2 or mask.shape[0] != ranking.shape[0]:
        raise ValueError(f"mask: expected shape ({ranking.shape[0]}, N), got {mask.shape}")
    if ranking.shape[1] > mask.shape[1]:
        raise ValueError(f"ranking: expected P <= N = {mask.shape[1]}, got P = {ranking.shape[1]}")
    k, threads = _count(k, "k", ranking.shape[1], "P"), _threads(threads)
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
    threads: int = 1,
) -> Array:
    """Picks `keep` of the N tokens of each image, relevant to the query and not redundant; see `script_kernels.prune`.

    Args:
        tokens: (B, N, D).
        query: (B or 1, Q, C), or None: all tokens are equally relevant.
        keep: 1 <= keep <= N.
        aligned: (B, N, C), the tokens in the query's space; default `tokens`.
        query_mask: (B or 1, Q) bool.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor: see `script_kernels.prune`.
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
    tokens = _tokens(tokens)
    n = tokens.shape[1]
    keep = _count(keep, "keep", n, "N")
    if query is None:
        aligned = query_mask = None
    else:
        if aligned is not None:
            aligned = _array(aligned, "aligned", tokens.dtype)
            if aligned.ndim != 3 or aligned.shape[:2] != tokens.shape[:2] or aligned.shape[2] < 1:
                raise ValueError(
                    f"aligned: expected shape ({tokens.shape[0]}, {n}, C) with C >= 1, got {aligned.shape}"
                )
        width = (tokens if aligned is None else aligned).shape[2]
        query, query_mask = _query(query, query_mask, tokens, tokens.shape[0], width)
    options = _options(negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor)
    options.check_drop(n)
    return _core.prune(
        _words(tokens),
        None if query is None else _words(query),
        keep,
        None if aligned is None else _words(aligned),
        query_mask,
        _values(options),
        _threads(threads),
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
    threads: int = 1,
) -> Array:
    """`prune` on segments of different lengths, packed behind each other; see `script_kernels.prune_varlen`.

    Args:
        tokens: (T, D).
        cu_seqlens: (S + 1,) int32, ascending from 0 to T: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        query: (S or 1, Q, C), or None: all tokens are equally relevant.
        keep: one count per segment, 1 <= keep[s] <= its length, 0 for an empty one.
        aligned: (T, C), the tokens in the query's space; default `tokens`.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor: see `script_kernels.prune`.
        threads: how many threads the call may use, >= 1.

    Returns:
        (sum(keep),) int64, indices into the packed tokens, ascending.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949).
    """
    tokens = _tokens(tokens, "(T, D)")
    total = tokens.shape[0]
    cu_seqlens = _array(cu_seqlens, "cu_seqlens", np.int32)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), got {cu_seqlens.shape}")
    segments = cu_seqlens.shape[0] - 1
    keep = [_whole(kept) for kept in keep] if isinstance(keep, Sequence) else keep
    check_keeps(keep)
    if len(keep) != segments:
        raise ValueError(f"keep: expected one count per segment, S = {segments}, got {len(keep)} counts")
    if query is None:
        aligned = None
    else:
        if aligned is not None:
            aligned = _array(aligned, "aligned", tokens.dtype)
            if aligned.ndim != 2 or aligned.shape[0] != total or aligned.shape[1] < 1:
                raise ValueError(f"aligned: expected shape ({total}, C) with C >= 1, got {aligned.shape}")
        width = (tokens if aligned is None else aligned).shape[1]
        query, _ = _query(query, None, tokens, segments, width)
    options = _options(negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor)
    starts = cu_seqlens.tolist()
    options.check_segments(starts, total, keep)
    return _core.prune_varlen(
        _words(tokens),
        starts,
        None if query is None else _words(query),
        list(keep),
        None if aligned is None else _words(aligned),
        _values(options),
        _threads(threads),
    )


# Checks.


def _is_array(value: object, argument: str) -> None:
    """An array, but none whose elements may be hidden: nothing here would look at its mask."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{argument}: expected a numpy.ndarray, got {type(value).__name__}")


def _array(value: Array, argument: str, dtype: npt.DTypeLike) -> Array:
    """An array of this dtype whose strides are whole elements (a field of a record array is copied)."""
    _is_array(value, argument)
    if value.dtype != dtype:
        raise TypeError(f"{argument}: expected {np.dtype(dtype).name}, got {value.dtype.name}")
    check_sizes(value.shape, argument)
    whole = value.flags.aligned and all(stride % value.itemsize == 0 for stride in value.strides)
    return value if whole else value.copy()


def _tokens(tokens: Array, shape: str = "(B, N, D)") -> Array:
    _is_array(tokens, "tokens")
    if tokens.dtype.name not in ("float32", "bfloat16", "float16") or not tokens.dtype.isnative:
        raise TypeError(f"tokens: expected float32, bfloat16 or float16, got {tokens.dtype.name}")
    if tokens.ndim != shape.count(",") + 1 or tokens.shape[-1] < 1:
        raise ValueError(f"tokens: expected shape {shape} with D >= 1, got {tokens.shape}")
    return _array(tokens, "tokens", tokens.dtype)


def _query(query: Array, query_mask: Array | None, tokens: Array, batch: int, width: int) -> tuple[Array, Array | None]:
    """The query and its mask, fit to be compared with `batch` images of tokens of `width` in its space."""
    query = _array(query, "query", tokens.dtype)
    if query.ndim != 3 or query.shape[0] not in (batch, 1) or query.shape[1] < 1 or query.shape[2] != width:
        raise ValueError(f"query: expected shape ({batch} or 1, Q >= 1, {width}), got {query.shape}")
    if query_mask is not None:
        query_mask = _array(query_mask, "query_mask", np.bool_)
        if query_mask.ndim != 2 or query_mask.shape[0] not in (batch, 1) or query_mask.shape[1] != query.shape[1]:
            raise ValueError(f"query_mask: expected shape ({batch} or 1, {query.shape[1]}), got {query_mask.shape}")
    return query, query_mask


def _words(array: Array) -> Array:
    """bfloat16 is no type of NumPy's own and travels as its 16 bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _whole(value: Any) -> Any:
    """An integer of NumPy's as Python's own, anything else as it is: the checks speak of that."""
    return int(value) if isinstance(value, np.integer) else value


def _real(value: Any) -> Any:
    """A number of NumPy's as Python's own, anything else as it is."""
    return float(value) if isinstance(value, np.floating) else _whole(value)


def _count(count: int, argument: str, limit: int, limit_name: str) -> int:
    count = _whole(count)
    check_int(count, argument)
    if not 1 <= count <= limit:
        raise ValueError(f"{argument}: expected 1 <= {argument} <= {limit_name} = {limit}, got {count}")
    return count


def _threads(threads: int) -> int:
    threads = _whole(threads)
    check_int(threads, "threads")
    if threads < 1:
        raise ValueError(f"threads: expected threads >= 1, got {threads}")
    return threads


def _options(
    negate: bool,
    gsp_drop: float,
    oversample: float,
    combine: str,
    threshold: float,
    gamma: float,
    min_degree: int,
    rounds: int,
    floor: float,
) -> PruneOptions:
    options = PruneOptions(
        negate=bool(negate),
        gsp_drop=_real(gsp_drop),
        oversample=_real(oversample),
        combine=combine,
        threshold=_real(threshold),
        gamma=_real(gamma),
        min_degree=_whole(min_degree),
        rounds=_whole(rounds),
        floor=_real(floor),
    )
    options.check()
    return options


def _values(options: PruneOptions) -> tuple[bool, float, float, str, float, float, int, int, float]:
    """The options as _core takes them."""
    return (
        options.negate,
        float(options.gsp_drop),
        float(options.oversample),
        options.combine,
        float(options.threshold),
        float(options.gamma),
        options.min_degree,
        options.rounds,
        float(options.floor),
    )
