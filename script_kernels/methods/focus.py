"""A share of the budget where the question points, a few typical tokens, and the rest by `script`.

Diversity keeps half of what a question is about, as the patches of a thing are each other's like. So a relevance is
first averaged over what is like a token in its grid, and over its surroundings there, and as many of the best are
taken as the question calls for; the typical ones tell what the rest of the image looks like. A relevance that tells
few tokens from the many gets no share at all, so that one which means nothing does no harm. docs/judge.md has figures.

All images at once, in shapes that depend on no value: nothing here waits for a GPU.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..options import CLEAR, VAGUE, WARMTH, Grids, check_grids, number, share_given
from ._common import blank, check, finite, unit
from .dpp import Stages, script_stages

MOST = 2**24  # similarities at a time


def focus(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    least: float = 0.5,
    most: float = 0.625,
    typical: float = 0.125,
    near: int = 2,
    negate: bool = False,
    floor: float = 0.3,
    survivors: float = 2.0,
    above: Tensor | None = None,
    grids: Grids | None = None,
) -> Tensor:
    """Tokens by a relevance that is spread over their likes, `typical` ones, and the others by `script`.

    Of the budget, twice as many as lie above half of the spread relevance's range go by it, but no less than `least`
    and no more than `most` of it; half of `least` where more than the budget lie there. A share `typical` goes to the
    tokens of largest cosine to the mean direction of the image. Both shares grow from nothing, for budgets of 1/18 of
    the tokens, to all, for 1/9; and they shrink to nothing where the median lies high in the range, from 1/8 of it to
    1/4. Without a relevance, and without `grids`, `script` alone chooses.

    grids: (rows, columns) of the grids that the tokens fill one after the other, each line by line: the spread
    relevance is also averaged over the square of 2 near + 1 tokens a side around each, as far as it lies in its grid.
    above: the relevance that is spread, (B, N) by `relevance_of(reduce="above")`; None: `relevance`. floor, survivors:
    of `script`, for which GSP leaves as many tokens as the shares may take, and `survivors` times the rest.
    """
    return focus_stages(
        tokens,
        relevance,
        keep,
        least=least,
        most=most,
        typical=typical,
        near=near,
        negate=negate,
        floor=floor,
        survivors=survivors,
        above=above,
        grids=grids,
    ).kept


def focus_stages(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    least: float,
    most: float,
    typical: float,
    near: int,
    negate: bool,
    floor: float,
    survivors: float,
    above: Tensor | None = None,
    grids: Grids | None = None,
    done: Callable[[str], None] = lambda stage: None,
) -> Stages:
    """`focus` with what its stages found: GSP and QCSP of what the two shares left. `done`: as for `script_stages`."""
    check(tokens, relevance, keep)
    n = tokens.shape[1]
    whole = share_given(keep / n, least, most, typical, near)
    if grids is not None:
        check_grids(grids, n)
    if above is not None:
        checks.by_token(above, "above", tokens)
    number(survivors, "survivors", 1.0)
    how: dict[str, Any] = {"floor": floor, "combine": "restrict", "negate": negate, "done": done}
    if relevance is None or grids is None or whole == 0.0:
        return script_stages(tokens, relevance, keep, survivors=survivors, **how)
    # As many as the shares may take, and `survivors` times the rest.
    how["survivors"] = survivors - (survivors - 1) * (most + typical) * whole
    pointing = relevance if above is None else above
    taken = shares(tokens, 1 - pointing if negate else pointing, keep, Shares(least, most, typical, near, whole), grids)
    # What is taken is like nothing, so that GSP leaves it alone, and comes last in QCSP's order.
    rest = script_stages(blank(tokens.clone(), taken), relevance.masked_fill(taken, math.nan), keep, **how)
    own = ~taken.gather(1, rest.order)
    picks = own & (own.cumsum(1) <= keep - taken.sum(1, keepdim=True))
    stays = taken.scatter(1, rest.order, picks | ~own)
    kept = stays.byte().argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
    return rest._replace(kept=kept, taken=taken)


class Shares(NamedTuple):
    """Of the budget, see `focus`; `whole`: how much of them this budget is given."""

    least: float
    most: float
    typical: float
    near: int
    whole: float


def shares(tokens: Tensor, relevance: Tensor, keep: int, by: Shares, grids: Grids) -> Tensor:
    """(B, N) bool: the tokens that are chosen by relevance and as typical ones."""
    good = finite(tokens) & torch.isfinite(relevance)
    rows = unit(tokens)
    seen = spread(rows, relevance.masked_fill(~good, 0.0), good, grids)
    median = seen.masked_fill(~good, math.nan).nanmedian(1).values.double().nan_to_num(1.0)
    whole = by.whole * ((VAGUE - median) / (VAGUE - CLEAR)).clamp(0, 1)
    above = ((seen > 0.5) & good).sum(1)
    wanted = (2.0 * above).clamp(by.least * keep, by.most * keep)
    wanted = torch.where(above <= keep, wanted, by.least * keep / 2)
    score = surroundings(seen.square(), grids, by.near)
    found = first(score.masked_fill(~good, -math.inf), wanted * whole)
    likeness = (rows * rows.mean(1, keepdim=True)).sum(2)
    return found | first(likeness.masked_fill(~good | found, -math.inf), by.typical * keep * whole)


def first(score: Tensor, many: Tensor) -> Tensor:
    """(B, N) bool: in each row the `many` (B,) tokens of largest score; between equals the lower index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device)
    # 1e-9 takes off rounding such as 0.7 * 10 = 6.999999999999999.
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, place < (many + 1e-9).floor()[:, None])


def spread(rows: Tensor, relevance: Tensor, good: Tensor, grids: Grids) -> Tensor:
    """A relevance (B, N) averaged over the good tokens of its grid that are like each one, then over its range.

    rows: of norm 1. Work and memory grow with the grids of an image or a video, and not with their square.
    """
    # Image by image, as products of several at once may round in another order.
    images = zip(rows, relevance, good, strict=True)
    parts = [torch.cat([_alike(*run) for _, *run in _runs(grids, *image)]) for image in images]
    mean = torch.stack(parts) if parts else relevance
    low = mean.masked_fill(~good, math.inf).amin(1, keepdim=True)
    high = mean.masked_fill(~good, -math.inf).amax(1, keepdim=True)
    return torch.where(high - low > 1e-6, (mean - low) / (high - low).clamp(min=1e-6), 1.0)


def _runs(grids: Grids, *values: Tensor) -> Iterator[tuple[Any, ...]]:
    """Shape, and (G, n, ...) of each of the values (N, ...), for each run of G grids of one shape, of n tokens."""
    start = 0
    for shape, run in itertools.groupby(map(tuple, grids)):
        count, n = len(list(run)), math.prod(shape)
        yield shape, *(x[start : start + count * n].unflatten(0, (count, n)) for x in values)
        start += count * n


def _alike(rows: Tensor, relevance: Tensor, good: Tensor) -> Tensor:
    """(G n,): the mean relevance (G, n) of the tokens of each grid that are like each one."""
    n = rows.shape[1]
    parts = []
    for grid, own, usable in zip(*(x.split(max(1, MOST // n**2)) for x in (rows, relevance, good)), strict=True):
        means = []
        for some in grid.split(max(1, MOST // (len(grid) * n)), 1):  # so many similarities at a time
            weights = torch.softmax((some @ grid.mT / WARMTH).masked_fill(~usable[:, None], -math.inf), 2)
            means.append((torch.nan_to_num(weights) @ own[..., None])[..., 0])
        parts.append(torch.cat(means, 1).flatten())
    return torch.cat(parts)


def surroundings(score: Tensor, grids: Grids, near: int) -> Tensor:
    """The mean of a score (B, N) over the square of 2 near + 1 tokens a side, as far as it lies in its grid."""
    parts = []
    for shape, part in _runs(grids, score.T):
        side = [2 * min(near, size - 1) + 1 for size in shape]  # a wider square is no other one
        padding = [size // 2 for size in side]
        images = part.movedim(2, 0).unflatten(2, shape)  # (B, G, rows, columns)
        parts.append(F.avg_pool2d(images, side, stride=1, padding=padding, count_include_pad=False).flatten(1))
    return torch.cat(parts, 1)
