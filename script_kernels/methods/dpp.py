"""Greedy MAP of a DPP, on the op `qcsp`: what differs is the rows and the relevance that go in.

The op's kernel is L = diag(r) S diag(r) with S the cosines of the rows. Any kernel of the form M Mᵀ is that of the rows
of M with their norms as relevance, so a power, a floor, a mixture and raw norms need no op of their own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import dpp_map, gsp, mask_intersect, qcsp
from ..options import PruneOptions, rounds_needed
from ._common import check, finite, number, ones, unit

FEWEST = 16  # GSP stops at one token in so many, which takes it some 15 rounds; one in 500 would take 200
COMBINE = ("intersect", "restrict", "union")


def weighted(
    tokens: Tensor, relevance: Tensor | None, power: float, mix: float, floor: float, negate: bool
) -> tuple[Tensor, Tensor]:
    """Rows and relevance whose qcsp kernel is (1 - mix) S + mix diag(p) S diag(p), p = (floor + (1 - floor) r)^power.

    With relevance in [0, 1]; `negate` takes 1 - r for r.
    """
    power, mix = number(power, "power", 0.0, 64.0), number(mix, "mix", 0.0, 1.0)
    floor = number(floor, "floor", 0.0, 1.0)
    if relevance is None:
        return tokens, ones(tokens)
    r = relevance
    if negate:
        r = 1 - r
    if floor or power != 1:
        r = (floor + (1 - floor) * r).clamp(min=0) ** power
    if mix == 1:
        return tokens, r
    x = unit(tokens)
    rows = torch.cat([math.sqrt(1 - mix) * x, math.sqrt(mix) * r[..., None] * x], -1)
    return rows, torch.sqrt((1 - mix) + mix * r * r)


def ranked(tokens: Tensor, relevance: Tensor, k: int, ridge: float) -> Tensor:
    """QCSP's order (B, k) for the kernel L + ridge * I; with a ridge by `dpp_map`, on N x N floats an image."""
    if number(ridge, "ridge", 0.0) == 0:
        return qcsp(tokens, relevance, k)[0]
    rows = unit(tokens) * relevance[..., None]
    kernel = rows @ rows.mT + ridge * torch.eye(tokens.shape[1], device=tokens.device)
    kernel.diagonal(dim1=1, dim2=2).masked_fill_(~finite(tokens), math.nan)
    return dpp_map(kernel, k)[0]


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
    **options: Any,
) -> Tensor:
    """Script (arXiv 2512.01949): QCSP's ranking and GSP's survivors, joined by `combine`.

    intersect: the first `keep` of a ranking of `oversample * keep` that GSP kept, filled up from its rest. restrict:
    QCSP on the survivors alone, of which there must be `keep`. union: half of the budget to the tokens that GSP, run
    down to that half, keeps; the other half, and what both would take, to QCSP's order.

    `survivors` stands in for `gsp_drop` and `rounds`, except in a union: GSP goes on, in as many rounds as it takes,
    until that many times `keep` tokens are left, or one in `FEWEST`.
    """
    check(tokens, relevance, keep)
    if combine not in COMBINE:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
    given = PruneOptions(combine="restrict" if combine == "union" else combine, **options)
    given.check()
    N = tokens.shape[1]
    graph = {name: getattr(given, name) for name in ("threshold", "gamma", "min_degree")}
    rows, r = weighted(tokens, relevance, power, mix, floor, negate)
    if combine == "union":
        half = (keep + 1) // 2
        mask, _ = gsp(tokens, half, rounds=max(given.rounds, rounds_needed(N, half)), **graph)
        order = ranked(rows, r, keep, ridge)
        # GSP's own first, then the order's others: rank GSP's half before everything.
        first = torch.where(mask, 0, 2)
        place = torch.arange(keep, device=tokens.device).expand_as(order)
        key = (first * N).scatter(1, order, torch.where(mask.gather(1, order), 0, N + place))
        return key.argsort(dim=1, stable=True)[:, :keep].sort(1).values
    if survivors is None:
        given.check_drop(N)
        left, rounds = given.gsp_keep(N), given.rounds
    else:
        left = min(N, max(math.ceil(number(survivors, "survivors", 1.0) * keep), -(-N // FEWEST)))
        rounds = max(given.rounds, rounds_needed(N, left))
    mask, _ = gsp(tokens, left, rounds=rounds, **graph)
    if combine == "intersect":
        return mask_intersect(ranked(rows, r, given.ranked(N, keep), ridge), mask, keep)
    if left < keep:
        raise ValueError(f"keep: expected keep <= {left}, which gsp_drop leaves to 'restrict', got {keep}")
    where = (~mask).byte().argsort(dim=1, stable=True)[:, :left]  # unlike nonzero, without waiting for a GPU
    picks = ranked(rows.gather(1, where[..., None].expand(-1, -1, rows.shape[2])), r.gather(1, where), keep, ridge)
    return where.gather(1, picks).sort(1).values


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
    rows, r = weighted(tokens, relevance, power, mix, floor, negate)
    return ranked(rows, r, keep, ridge).sort(1).values


def dpp(tokens: Tensor, relevance: Tensor | None, keep: int, *, ridge: float = 0.0) -> Tensor:
    """Greedy MAP with kernel S: the diversity of CDPruner without a question."""
    check(tokens, relevance, keep)
    return ranked(tokens, ones(tokens), keep, ridge).sort(1).values


def resprune(tokens: Tensor, relevance: Tensor | None, keep: int, *, alpha: float = 1.0) -> Tensor:
    """ResPrune (arXiv 2603.21105): argmax of r^alpha times the energy left of the raw row outside the span kept so far.

    That energy is the residual of the greedy DPP, so this is greedy MAP on the rows r^(alpha / 2) x.
    """
    check(tokens, relevance, keep)
    alpha = number(alpha, "alpha", 0.0, 64.0)
    good = finite(tokens)
    x = tokens.float().masked_fill(~good[..., None], 0.0)
    largest = x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    norm = (x / largest).norm(dim=-1)
    r = ones(tokens) if relevance is None else relevance.clamp(min=0) ** (alpha / 2)
    return qcsp(tokens, r * norm, keep)[0].sort(1).values


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
    gram = x @ x.mT
    kernel = gamma * (gram @ gram.mT) + torch.eye(x.shape[1], device=x.device)
    kernel.diagonal(dim1=1, dim2=2).masked_fill_(~good, math.nan)  # dpp_map takes such tokens last
    return dpp_map(kernel, keep)[0].sort(1).values
