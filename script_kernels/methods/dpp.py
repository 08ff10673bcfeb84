"""Greedy MAP of a DPP, on the op `qcsp`: what differs is the rows and the relevance that go in.

The op's kernel is diag(p) S diag(p) + ridge I, p a power of the relevance and S the cosines of the rows or their raw
products. Any kernel of the form M Mᵀ is that of the rows of M with their norms as relevance, so that a mixture needs no
op of its own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gsp, mask_intersect, qcsp
from ..options import COMBINE, PruneOptions, number, rounds_needed, survivors_of, union_share
from ._common import check, finite, ones, split_order, unit


class Weighted(NamedTuple):
    """What `qcsp` makes a kernel of."""

    rows: Tensor
    relevance: Tensor
    power: float


def weighted(
    tokens: Tensor, relevance: Tensor | None, power: float, mix: float, floor: float, negate: bool
) -> Weighted:
    """What gives `qcsp` the kernel (1 - mix) S + mix diag(p) S diag(p), p = (floor + (1 - floor) r)^power.

    With relevance in [0, 1]; `negate` takes 1 - r for r.
    """
    power, mix = number(power, "power", 0.0, 64.0), number(mix, "mix", 0.0, 1.0)
    floor = number(floor, "floor", 0.0, 1.0)
    if relevance is None:
        return Weighted(tokens, ones(tokens), 1.0)
    r = relevance
    if negate:
        r = 1 - r
    if floor or power != 1:
        r = (floor + (1 - floor) * r).clamp(min=0)
    if mix == 1:
        return Weighted(tokens, r, power)
    r = r**power
    x = unit(tokens)
    rows = torch.cat([math.sqrt(1 - mix) * x, math.sqrt(mix) * r[..., None] * x], -1)
    rows = rows.masked_fill(~finite(tokens)[..., None], math.nan)  # such tokens go last, as they would as they came
    return Weighted(rows, torch.sqrt((1 - mix) + mix * r * r), 1.0)


def ranking(given: Weighted, k: int, ridge: float) -> tuple[Tensor, Tensor]:
    """QCSP's order and gains (B, k) for the kernel L + ridge * I."""
    return qcsp(given.rows, given.relevance, k, power=given.power, ridge=number(ridge, "ridge", 0.0))


class Stages(NamedTuple):
    """What each stage of `script` made of (B, N) tokens."""

    mask: Tensor  # (B, N) bool, False where GSP dropped
    redundancy: Tensor  # (B, N) fp32, as `gsp` returns it
    order: Tensor  # (B, R) int64 tokens, best first
    gains: Tensor  # (B, R) fp32, of `order`
    kept: Tensor  # (B, keep) int64 ascending
    taken: Tensor | None = None  # (B, N) bool, kept by another rule before these stages


def script_stages(
    tokens: Tensor,
    relevance: Tensor | None,
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
    done: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> Stages:
    """`script` with what its stages found; `done` is called with each one's name as soon as it is queued."""
    check(tokens, relevance, keep)
    where = split_order(tokens, split, grid_width)
    how: dict[str, Any] = {"power": power, "mix": mix, "floor": floor, "negate": negate, "ridge": ridge}
    how |= {"combine": combine, "survivors": survivors, "done": done, **options}
    if where is None:
        return _stages(tokens, relevance, keep, **how)
    found = _stages(tokens[:, where], None if relevance is None else relevance[:, where], keep, **how)
    back = where.argsort()
    return Stages(
        found.mask[:, back],
        found.redundancy[:, back],
        where[found.order],
        found.gains,
        where[found.kept].sort(1).values,
    )


def _stages(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    power: float,
    mix: float,
    floor: float,
    negate: bool,
    ridge: float,
    combine: str,
    survivors: float | None,
    done: Callable[[str], None],
    **options: Any,
) -> Stages:
    """The stages on tokens that alternate between sources and destinations as they come."""
    if combine not in COMBINE:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
    if "reduce" in options:
        raise TypeError("reduce: expected in `relevance_of`, got it in a method, which is given the relevance")
    given = PruneOptions(combine=combine, **options)
    given.check()
    N = tokens.shape[1]
    graph = {name: getattr(given, name) for name in ("threshold", "gamma", "min_degree")}
    kernel = weighted(tokens, relevance, power, mix, floor, negate)
    if combine == "union":
        half = union_share(keep)
        mask, redundancy = gsp(tokens, half, rounds=max(given.rounds, rounds_needed(N, half)), **graph)
        done("gsp")
        order, gains = ranking(kernel, keep, ridge)
        done("qcsp")
        # GSP's own first, then the order's others: rank GSP's half before everything.
        first = torch.where(mask, 0, 2)
        place = torch.arange(keep, device=tokens.device).expand_as(order)
        key = (first * N).scatter(1, order, torch.where(mask.gather(1, order), 0, N + place))
        kept = key.argsort(dim=1, stable=True)[:, :keep].sort(1).values
        done("join")
        return Stages(mask, redundancy, order, gains, kept)
    if survivors is None:
        given.check_drop(N, keep)
        left, rounds = given.gsp_keep(N), given.rounds
    else:
        left = survivors_of(N, keep, survivors)
        rounds = max(given.rounds, rounds_needed(N, left))
    mask, redundancy = gsp(tokens, left, rounds=rounds, **graph)
    done("gsp")
    if combine == "intersect":
        order, gains = ranking(kernel, given.ranked(N, keep), ridge)
        done("qcsp")
        kept = mask_intersect(order, mask, keep)
        done("join")
        return Stages(mask, redundancy, order, gains, kept)
    if left < keep:
        raise ValueError(f"keep: expected keep <= {left}, which gsp_drop leaves to 'restrict', got {keep}")
    where = (~mask).byte().argsort(dim=1, stable=True)[:, :left]  # unlike nonzero, without waiting for a GPU
    own = kernel.rows.gather(1, where[..., None].expand(-1, -1, kernel.rows.shape[2]))
    picks, gains = ranking(Weighted(own, kernel.relevance.gather(1, where), kernel.power), keep, ridge)
    order = where.gather(1, picks)
    done("qcsp")
    kept = order.sort(1).values
    done("join")
    return Stages(mask, redundancy, order, gains, kept)


def script(
    tokens: Tensor,
    relevance: Tensor | None,
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
    **options: Any,
) -> Tensor:
    """Script (arXiv 2512.01949): QCSP's ranking and GSP's survivors, joined by `combine`.

    intersect: the first `keep` of a ranking of `oversample * keep` that GSP kept, filled up from its rest. restrict:
    QCSP on the survivors alone, of which there must be `keep`. union: half of the budget to the tokens that GSP, run
    down to that half, keeps; the other half, and what both would take, to QCSP's order.

    `survivors` stands in for `gsp_drop` and `rounds`, except in a union: GSP goes on, in as many rounds as it takes,
    until that many times `keep` tokens are left, or one in 16.

    `split`: "raster", or "checker" for a grid of `grid_width` columns, of which GSP's sources are then the squares of
    one colour.
    """
    return script_stages(
        tokens,
        relevance,
        keep,
        power=power,
        mix=mix,
        floor=floor,
        negate=negate,
        ridge=ridge,
        combine=combine,
        survivors=survivors,
        split=split,
        grid_width=grid_width,
        **options,
    ).kept


def cdpruner(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    power: float = 1.0,
    mix: float = 1.0,
    floor: float = 0.0,
    negate: bool = False,
    ridge: float = 0.0,
) -> Tensor:
    """CDPruner (arXiv 2506.10967): greedy MAP with kernel diag(r) S diag(r), and no graph stage."""
    check(tokens, relevance, keep)
    return ranking(weighted(tokens, relevance, power, mix, floor, negate), keep, ridge)[0].sort(1).values


def dpp(tokens: Tensor, relevance: Tensor | None, keep: int, *, ridge: float = 0.0) -> Tensor:
    """Greedy MAP with kernel S: the diversity of CDPruner without a question."""
    check(tokens, relevance, keep)
    return ranking(Weighted(tokens, ones(tokens), 1.0), keep, ridge)[0].sort(1).values


def resprune(tokens: Tensor, relevance: Tensor | None, keep: int, *, alpha: float = 1.0) -> Tensor:
    """ResPrune (arXiv 2603.21105): argmax of r^alpha times the energy left of the raw row outside the span kept so far.

    That energy is the residual of the greedy DPP, so this is greedy MAP on the rows r^(alpha / 2) x.
    """
    check(tokens, relevance, keep)
    alpha = number(alpha, "alpha", 0.0, 64.0)
    r = ones(tokens) if relevance is None else relevance.clamp(min=0)
    return qcsp(tokens, r, keep, power=alpha / 2, normalize=False)[0].sort(1).values


def otprune(tokens: Tensor, relevance: Tensor | None, keep: int, *, gamma: float = 0.01) -> Tensor:
    """OTPrune (arXiv 2602.20205): greedy log det(I + gamma G Gᵀ), where G = X Xᵀ and X's columns have unit norm.

    As its code does it: the columns are the features, taken over the image's tokens.
    """
    check(tokens, relevance, keep)
    gamma = number(gamma, "gamma", 0.0)
    good = finite(tokens)
    x = tokens.float().masked_fill(~good[..., None], 0.0)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / norm, 0.0)
    gram = (x @ x.mT).masked_fill(~good[..., None], math.nan)  # such tokens go last
    return qcsp(gram, math.sqrt(gamma) * ones(gram), keep, normalize=False, ridge=1.0)[0].sort(1).values
