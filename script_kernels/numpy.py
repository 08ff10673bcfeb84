"""The ops on NumPy arrays, without PyTorch: for runtimes such as ONNX Runtime, OpenVINO or llama.cpp on edge devices.

Names, arguments and results are those of `script_kernels`; the same C++ cores run, so results are the same bit for bit
as those of the PyTorch ops on the CPU of the same machine. Arrays may be float32, float16 or bfloat16 (the `ml_dtypes`
type), in any strides. A call runs on the calling thread with the GIL released: threads of your own run images side by
side.

Bad arguments raise before any work: ValueError (values, shapes) or TypeError (dtypes, types), with a message
`argument: expected what, got what came`.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .options import GspOptions, PruneOptions

try:
    from . import _core
except ImportError as error:
    raise ImportError(
        f"script_kernels.numpy needs the compiled module _core: {error}. "
        "To build it, run in the source tree: pip install --no-build-isolation -e ."
    ) from error

__all__ = ["gsp", "mask_intersect", "prune", "qcsp", "query_relevance"]

Array = npt.NDArray[Any]


def query_relevance(tokens: Array, query: Array, query_mask: Array | None = None, *, negate: bool = False) -> Array:
    """Mean cosine of each token with the query vectors, min-max scaled per image.

    Args:
        tokens: (B, N, C), tokens in the query's space.
        query: (B or 1, Q, C), Q >= 1, dtype of `tokens`.
        query_mask: (B or 1, Q) bool, True for the vectors that count; None: all.
        negate: flip the sign before the scaling.

    Returns:
        (B, N) float32 in [0, 1].

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), CDPruner (arXiv 2506.10967).
    """
    tokens = _tokens(tokens)
    query, query_mask = _query(query, query_mask, tokens, tokens)
    return _core.query_relevance(_words(tokens), _words(query), query_mask, bool(negate))


def gsp(
    tokens: Array,
    keep: int,
    *,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
) -> tuple[Array, Array]:
    """Drops the most redundant tokens of a bipartite graph until `keep` are left; see `script_kernels.gsp`.

    Args:
        tokens: (B, N, D).
        keep: 1 <= keep <= N tokens to keep, as far as `rounds` can reach: a round drops at most half.
        threshold, gamma, min_degree, rounds: the graph and its score.

    Returns:
        mask (B, N) bool, True for kept tokens, and redundancy (B, N) float32, 0 for what never was a source.

    Raises:
        ValueError, TypeError: see the module.

    Source: Script (arXiv 2512.01949), graph-structured pruning.
    """
    tokens = _tokens(tokens)
    keep = _count(keep, "keep", tokens.shape[1], "N")
    graph = _graph(threshold, gamma, min_degree, rounds)
    GspOptions(rounds=graph[3]).check_reachable(tokens.shape[1], keep)
    return _core.gsp(_words(tokens), keep, *graph)


def qcsp(tokens: Array, relevance: Array, k: int) -> tuple[Array, Array]:
    """Greedy MAP of the DPP with kernel L = diag(r) S diag(r); see `script_kernels.qcsp`.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32.
        k: 1 <= k <= N picks.

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
    return _core.qcsp(_words(tokens), relevance, _count(k, "k", tokens.shape[1], "N"))


def mask_intersect(ranking: Array, mask: Array, k: int) -> Array:
    """The first `k` of a ranking that are in a mask, filled up from the rest of the ranking.

    Args:
        ranking: (B, P) int64, best first, distinct indices in [0, N); P <= N.
        mask: (B, N) bool.
        k: 1 <= k <= P.

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
    k = _count(k, "k", ranking.shape[1], "P")
    try:
        return _core.mask_intersect(ranking, mask, k)
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
) -> Array:
    """Picks `keep` of the N tokens of each image, relevant to the query and not redundant; see `script_kernels.prune`.

    Args:
        tokens: (B, N, D).
        query: (B or 1, Q, C), or None: all tokens are equally relevant.
        keep: 1 <= keep <= N.
        aligned: (B, N, C), the tokens in the query's space; default `tokens`.
        query_mask: (B or 1, Q) bool.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds: as in `script_kernels.prune`.

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
        query, query_mask = _query(query, query_mask, tokens, tokens if aligned is None else aligned)
    if not 0 <= _number(gsp_drop, "gsp_drop") < 1:
        raise ValueError(f"gsp_drop: expected 0 <= gsp_drop < 1, got {gsp_drop}")
    if not 1 <= _number(oversample, "oversample") < math.inf:
        raise ValueError(f"oversample: expected a finite number >= 1, got {oversample}")
    if combine not in ("intersect", "restrict"):
        raise ValueError(f"combine: expected 'intersect' or 'restrict', got {combine!r}")
    graph = _graph(threshold, gamma, min_degree, rounds)
    PruneOptions(gsp_drop=gsp_drop, rounds=graph[3]).check_drop(n)
    return _core.prune(
        _words(tokens),
        None if query is None else _words(query),
        keep,
        None if aligned is None else _words(aligned),
        query_mask,
        bool(negate),
        float(gsp_drop),
        float(oversample),
        combine == "restrict",
        *graph,
    )


# Checks.


def _array(value: Array, argument: str, dtype: npt.DTypeLike) -> Array:
    """An array of this dtype whose strides are whole elements (a field of a record array is copied)."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{argument}: expected a numpy.ndarray, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{argument}: expected {np.dtype(dtype).name}, got {value.dtype.name}")
    whole = value.flags.aligned and all(stride % value.itemsize == 0 for stride in value.strides)
    return value if whole else value.copy()


def _tokens(tokens: Array) -> Array:
    if not isinstance(tokens, np.ndarray):
        raise TypeError(f"tokens: expected a numpy.ndarray, got {type(tokens).__name__}")
    if tokens.dtype.name not in ("float32", "bfloat16", "float16") or not tokens.dtype.isnative:
        raise TypeError(f"tokens: expected float32, bfloat16 or float16, got {tokens.dtype.name}")
    if tokens.ndim != 3 or tokens.shape[2] < 1:
        raise ValueError(f"tokens: expected shape (B, N, D) with D >= 1, got {tokens.shape}")
    return _array(tokens, "tokens", tokens.dtype)


def _query(query: Array, query_mask: Array | None, tokens: Array, space: Array) -> tuple[Array, Array | None]:
    """The query and its mask, fit to be compared with the tokens in `space`."""
    batch, width = tokens.shape[0], space.shape[2]
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


def _int(value: int, argument: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")
    return int(value)


def _number(value: float, argument: str) -> float:
    if not isinstance(value, (float, int, np.floating, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a float, got {type(value).__name__}")
    return float(value)


def _count(count: int, argument: str, limit: int, limit_name: str) -> int:
    count = _int(count, argument)
    if not 1 <= count <= limit:
        raise ValueError(f"{argument}: expected 1 <= {argument} <= {limit_name} = {limit}, got {count}")
    return count


def _graph(threshold: float, gamma: float, min_degree: int, rounds: int) -> tuple[float, float, int, int]:
    for value, argument in ((threshold, "threshold"), (gamma, "gamma")):
        if not math.isfinite(_number(value, argument)):
            raise ValueError(f"{argument}: expected a finite number, got {value}")
    if _int(min_degree, "min_degree") < 0:
        raise ValueError(f"min_degree: expected min_degree >= 0, got {min_degree}")
    if _int(rounds, "rounds") < 1:
        raise ValueError(f"rounds: expected rounds >= 1, got {rounds}")
    return float(threshold), float(gamma), int(min_degree), int(rounds)
