"""Where a question points, on NumPy arrays: the shares of the method `focus`, and the relevance that they go by.

`script_kernels.methods.focus` says what they are for; this is the same arithmetic.
"""

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays
from .numpy import query_relevance
from .options import CLEAR, REDUCE_BY_METHODS, VAGUE, WARMTH, Grids, check_name

Array = npt.NDArray[Any]
MOST = 2**24  # similarities at a time


def good_rows(tokens: Array) -> tuple[Array, Array]:
    """(B, N) bool, rows without a NaN or an Inf, and the tokens in float32 with zeros for the others."""
    x = tokens.astype(np.float32)
    good: Array = np.asarray(np.isfinite(x).all(-1))
    return good, np.where(good[..., None], x, np.float32(0))


def unit(tokens: Array) -> Array:
    """Rows over their norms in float32; zero rows, and rows with a NaN or an Inf, become zeros."""
    x = good_rows(tokens)[1]
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest > 0, largest, np.float32(1))  # squares of the largest float32 would overflow
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return np.asarray(x / np.where(norm > 0, norm, np.float32(1)))


def relevance_of(
    tokens: Array,
    query: Array,
    query_mask: Array | None = None,
    *,
    reduce: str = "mean",
    negate: bool = False,
    threads: int = 1,
) -> Array:
    """`script_kernels.numpy.query_relevance`, with the further reduction "above" of `script_kernels.methods`.

    That is the largest of how far a cosine lies above the median of its word's over the image: what `focus` takes as
    `above`.

    Args:
        tokens: (B, N, C), tokens in the query's space.
        query: (B or 1, Q, C), Q >= 1, dtype of `tokens`.
        query_mask: (B or 1, Q) bool, True for the vectors that count; None: all.
        reduce: "mean" or "max" of the cosines, or "above".
        negate: flip the sign before the scaling.
        threads: how many threads the call may use, >= 1.

    Returns:
        (B, N) float32 in [0, 1].

    Raises:
        ValueError, TypeError: what `query_relevance` raises.
    """
    check_name(reduce, "reduce", REDUCE_BY_METHODS)
    if reduce != "above":
        return query_relevance(tokens, query, query_mask, negate=negate, reduce=reduce, threads=threads)
    tokens, threads = arrays.tokens(tokens), arrays.threads(threads)
    query, query_mask = arrays.query(query, query_mask, tokens, tokens.shape[0], tokens.shape[2])
    good, known = good_rows(tokens)[0], good_rows(query)[0]
    if query_mask is not None:
        known = known & (query_mask != 0)
    cosine = unit(tokens) @ unit(query).swapaxes(1, 2) * np.float32(-1 if negate else 1)  # (B, N, Q)
    # The lower median, of the good tokens alone: with the others sorted behind.
    order = np.sort(np.where(good[..., None], cosine, np.float32(np.inf)), 1)
    middle = np.maximum(good.sum(1) - 1, 0) // 2
    above = cosine - np.take_along_axis(order, middle[:, None, None], 1)
    score = np.where(known[:, None], above, np.float32(-np.inf)).max(2)
    low = np.where(good, score, np.float32(np.inf)).min(1, keepdims=True)
    high = np.where(good, score, np.float32(-np.inf)).max(1, keepdims=True)
    return np.where(good, _over_range(score, low, high), np.float32(0))


def _over_range(score: Array, low: Array, high: Array) -> Array:
    with np.errstate(invalid="ignore"):  # where nothing is good, or known
        spread = high - low
        found = np.where(spread > 1e-6, (score - low) / np.maximum(spread, np.float32(1e-6)), np.float32(1))
    return np.asarray(found, np.float32)


def shares(
    tokens: Array,
    relevance: Array,
    keep: int,
    of_budget: tuple[float, float, float],
    near: int,
    whole: float,
    grids: Grids,
) -> Array:
    """(B, N) bool: the tokens that are chosen by relevance and as typical ones; of_budget: least, most and typical."""
    least, most, typical = (share * keep for share in of_budget)
    good = good_rows(tokens)[0] & np.isfinite(relevance)
    rows = unit(tokens)
    seen = _spread(rows, np.where(good, relevance, np.float32(0)), good, grids)
    order = np.sort(np.where(good, seen, np.float32(np.inf)), 1)
    middle = np.take_along_axis(order, np.maximum(good.sum(1, keepdims=True) - 1, 0) // 2, 1)[:, 0]
    given = whole * np.clip((VAGUE - np.where(good.any(1), middle, 1.0)) / (VAGUE - CLEAR), 0, 1)
    above = ((seen > 0.5) & good).sum(1)
    wanted = np.where(above <= keep, np.clip(2.0 * above, least, most), least / 2)
    score = _surroundings(seen.astype(np.float64) ** 2, grids, near)
    found = _first(np.where(good, score, -np.inf), wanted * given)
    likeness = (rows * rows.mean(1, keepdims=True)).sum(2)
    return found | _first(np.where(good & ~found, likeness, -np.inf), typical * given)


def _first(score: Array, many: Array) -> Array:
    """(B, N) bool: in each row the `many` (B,) tokens of largest score; between equals the lower index."""
    order = np.argsort(-score, 1, kind="stable")
    chosen = np.zeros(score.shape, bool)
    # 1e-9 takes off rounding such as 0.7 * 10 = 6.999999999999999.
    np.put_along_axis(chosen, order, np.arange(score.shape[1]) < np.floor(many + 1e-9)[:, None], 1)
    return chosen


def _spread(rows: Array, relevance: Array, good: Array, grids: Grids) -> Array:
    """A relevance (B, N) averaged over the good tokens of its grid that are like each one, then over its range."""
    mean = np.zeros_like(relevance)
    ends = itertools.accumulate(height * width for height, width in grids)
    for (height, width), end in zip(grids, ends, strict=True):
        part = slice(end - height * width, end)
        for b in range(len(rows)):
            usable = good[b, part]
            like, own = rows[b, part][usable], relevance[b, part][usable]
            if len(own):
                mean[b, part] = _alike(rows[b, part], like, own)
    low = np.where(good, mean, np.float32(np.inf)).min(1, keepdims=True)
    high = np.where(good, mean, np.float32(-np.inf)).max(1, keepdims=True)
    return _over_range(mean, low, high)


def _alike(rows: Array, like: Array, relevance: Array) -> Array:
    """(N,): the mean relevance of those of one grid that are like each of its rows."""
    parts = []
    step = max(1, MOST // len(rows))
    for start in range(0, len(rows), step):  # so many similarities at a time, and not N x N
        weights = rows[start : start + step] @ like.T / np.float32(WARMTH)
        weights = np.exp(weights - weights.max(1, keepdims=True))
        parts.append(weights @ relevance / weights.sum(1))
    return np.concatenate(parts)


def _surroundings(score: Array, grids: Grids, near: int) -> Array:
    """The mean of a score (B, N) over the square of 2 near + 1 tokens a side, as far as it lies in its grid."""
    parts = []
    start = 0
    for height, width in grids:
        grid = score[:, start : start + height * width].reshape(-1, height, width)
        start += height * width
        ones = np.ones((1, height, width))
        parts.append((_box(grid, near) / _box(ones, near)).reshape(len(grid), height * width))
    return np.concatenate(parts, 1)


def _box(grid: Array, near: int) -> Array:
    """(B, rows, columns): sums over squares, added in one order everywhere, so that equal squares have equal sums."""
    height, width = grid.shape[1:]
    for axis, size in ((1, height), (2, width)):
        reach = min(near, size - 1)
        padding = [(0, 0)] * 3
        padding[axis] = (reach, reach)
        wide = np.pad(grid, padding)
        steps = [wide.take(range(step, step + size), axis) for step in range(2 * reach + 1)]
        grid = functools.reduce(np.add, steps)
    return grid
