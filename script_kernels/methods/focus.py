"""A share of the budget where the question points, a few typical tokens, and the rest by `script`.

Diversity keeps half of what a question is about, as the patches of a thing are each other's like. So a relevance is
first averaged over what is like a token, and over its surroundings in the grid, and as many of the best tokens are
taken as the question calls for; the typical ones tell what the rest of the image looks like. docs/judge.md has figures.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import check_share, count, number
from ._common import check, finite, ones, top, unit
from .dpp import script

WARMTH = 0.05  # of the softmax over cosines: the patches of one thing are each other's like, and little else is
FEW, FULL = 1 / 18, 1 / 9  # of all tokens: up to the first `script` alone chooses, from the second on shares are whole


def focus(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    least: float = 0.5,
    most: float = 0.625,
    typical: float = 0.125,
    near: int = 2,
    grid_width: int | None = None,
    negate: bool = False,
    floor: float = 0.3,
    survivors: float = 2.0,
) -> Tensor:
    """Tokens by a relevance that is spread over their likes, `typical` ones, and the others by `script`.

    Of the budget, twice as many as lie above half of the relevance's range go by relevance, but no less than `least`
    and no more than `most` of it; half of `least` where more than the budget lie there, for then the relevance points
    nowhere. A share `typical` goes to the tokens of largest cosine to the mean direction of the image. Both shares grow
    from nothing, for budgets of 1/18 of the tokens, to all, for 1/9. Without a relevance, and without a `grid_width`,
    `script` alone chooses.

    near, grid_width: the relevance is also averaged over the square of 2 near + 1 tokens a side around each, as far as
    it lies in the grid of `grid_width` columns. floor, survivors: of `script`, which restricts QCSP
    to GSP's survivors. Chooses image by image, with a look at the device in each.
    """
    check(tokens, relevance, keep)
    for value, name in ((least, "least"), (most, "most"), (typical, "typical")):
        check_share(value, name)
    if not least <= most <= 1 - typical:
        raise ValueError(f"most: expected least <= most <= 1 - typical, got {least}, {most} and {typical}")
    n = tokens.shape[1]
    near = count(near, "near", 0)
    if grid_width is not None and n % count(grid_width, "grid_width", 1):
        raise ValueError(f"grid_width: expected a divisor of N = {n}, the tokens of whole rows, got {grid_width}")
    how: dict[str, Any] = {"floor": floor, "combine": "restrict", "survivors": number(survivors, "survivors", 1.0)}
    whole = min(max((keep / n - FEW) / (FULL - FEW), 0.0), 1.0)
    if relevance is not None and negate:
        relevance = 1 - relevance
    if relevance is None or grid_width is None or whole == 0.0 or len(tokens) == 0:
        return script(tokens, relevance, keep, **how)
    shares = (least * keep, most * keep, typical * keep)
    kept = []
    for image, own in zip(tokens.split(1), relevance.split(1), strict=True):
        good = finite(image) & torch.isfinite(own)
        seen = spread(image, own.masked_fill(~good, 0.0), good)
        score = surroundings(seen.square(), grid_width, near)
        above = int(((seen > 0.5) & good).sum())
        wanted = min(max(2.0 * above, shares[0]), shares[1]) if above <= keep else shares[0] / 2
        found = top(score.masked_fill(~good, -math.inf), int(wanted * whole))
        for most_of_it, rule in ((int(shares[2] * whole), _typical), (keep, script)):
            left = _others(found, n)
            rows = image.gather(1, left[..., None].expand(-1, -1, image.shape[2]))
            size = min(most_of_it, keep - found.shape[1])
            if size:
                picks = rule(rows, own.gather(1, left), size, **(how if rule is script else {}))
                found = torch.cat([found, left.gather(1, picks)], 1)
        kept.append(found.sort(1).values)
    return torch.cat(kept)


def spread(tokens: Tensor, relevance: Tensor, good: Tensor) -> Tensor:
    """A relevance (1, N) averaged over the good tokens (1, N, D) that are like each one, then over its range."""
    rows = unit(tokens.masked_fill(~good[..., None], 0.0))
    weights = torch.softmax((rows @ rows.mT / WARMTH).masked_fill(~good[:, None], -math.inf), 2)
    mean = (torch.nan_to_num(weights) @ relevance[..., None])[..., 0]
    low = mean.masked_fill(~good, math.inf).amin(1, keepdim=True)
    high = mean.masked_fill(~good, -math.inf).amax(1, keepdim=True)
    return torch.where(high - low > 1e-6, (mean - low) / (high - low).clamp(min=1e-6), ones(tokens))


def surroundings(score: Tensor, grid_width: int, near: int) -> Tensor:
    """The mean of a score (1, N) over the square of 2 near + 1 tokens a side, as far as it lies in the grid."""
    grid = score.view(1, 1, -1, grid_width)
    return F.avg_pool2d(grid, 2 * near + 1, stride=1, padding=near, count_include_pad=False).flatten(1)


def _typical(tokens: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """The tokens of largest cosine to the mean of all directions."""
    rows = unit(tokens)
    score = (rows @ rows.mean(1, keepdim=True).mT)[..., 0]
    return top(score.masked_fill(~finite(tokens) | ~torch.isfinite(relevance), -math.inf), keep)


def _others(found: Tensor, n: int) -> Tensor:
    """(1, n - k): the tokens that are not among the k found, ascending."""
    free = torch.ones(1, n, dtype=torch.bool, device=found.device).scatter(1, found, False)
    return free.nonzero()[:, 1].view(1, -1)
