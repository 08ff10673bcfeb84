"""Rules without a greedy residual: rankings, graphs, grids and chance."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import bipartite_match
from .. import gsp as graph_pruning
from ..options import GspOptions, count, rounds_needed
from ._common import check, finite, ones, split_order, top, unit


def relevance(tokens: Tensor, relevance: Tensor | None, keep: int, *, negate: bool = False) -> Tensor:
    """The tokens of largest relevance (`negate`: of smallest); between equals the lower index."""
    check(tokens, relevance, keep)
    score = ones(tokens) if relevance is None else -relevance if negate else relevance
    good = finite(tokens) & torch.isfinite(score)
    return top(score.masked_fill(~good, -math.inf), keep)


def gsp(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    rounds: int | None = None,
    split: str = "raster",
    grid_width: int | None = None,
    **options: Any,
) -> Tensor:
    """Script's graph stage alone, in as many rounds as it takes to get down to `keep` (`rounds`: at least so many).

    split: "raster", or "checker" for a grid of `grid_width` columns: see `_common.split_order`.
    """
    check(tokens, relevance, keep)
    order = split_order(tokens, split, grid_width)
    needed = rounds_needed(tokens.shape[1], keep)
    rounds = needed if rounds is None else max(needed, count(rounds, "rounds", 1))
    GspOptions(rounds=rounds, **options).check()
    mask, _ = graph_pruning(tokens if order is None else tokens[:, order], keep, rounds=rounds, **options)
    kept = mask.nonzero()[:, 1].view(-1, keep)
    return kept if order is None else order[kept].sort(1).values


def tome_drop(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    split: str = "raster",
    grid_width: int | None = None,
) -> Tensor:
    """ToMe's bipartite rule (arXiv 2210.09461) with dropping in place of merging.

    In each round the tokens left alternate between sources and destinations, and the sources most similar to their best
    destination go: as many as are too many, at most all sources. Between equals the earlier goes first.

    split: "raster", or "checker" for a grid of `grid_width` columns: see `_common.split_order`.
    """
    check(tokens, relevance, keep)
    order = split_order(tokens, split, grid_width)
    left = torch.arange(tokens.shape[1], device=tokens.device) if order is None else order
    left = left.expand(tokens.shape[0], -1)
    while left.shape[1] > keep:
        rows = tokens.gather(1, left[..., None].expand(-1, -1, tokens.shape[2]))
        best = bipartite_match(rows)[0]
        best = best.masked_fill(~finite(rows)[:, 0::2], math.inf)  # what cannot be compared goes first
        drop = min(left.shape[1] - keep, left.shape[1] // 2)
        gone = 2 * best.argsort(dim=1, descending=True, stable=True)[:, :drop]
        stay = torch.ones_like(left, dtype=torch.bool).scatter(1, gone, False)
        left = left[stay].view(left.shape[0], -1)
    return left.sort(1).values


def dart(tokens: Tensor, relevance: Tensor | None, keep: int, *, pivots: int = 8) -> Tensor:
    """After DART (arXiv 2502.11494): a few pivots, and the tokens that duplicate them least.

    The pivots are the tokens of largest norm; its paper takes norms of a layer's keys, which are not known before the
    language model runs. Each pivot in turn takes its share of the budget: the free tokens of smallest cosine to it.
    """
    check(tokens, relevance, keep)
    pivots = min(count(pivots, "pivots", 1), keep)
    x, good = unit(tokens), finite(tokens)
    largest = tokens.float().masked_fill(~good[..., None], 0.0)
    chosen = top(largest.norm(dim=-1).masked_fill(~good, -1.0), pivots)
    kept = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, chosen, True)
    near = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])) @ x.mT
    left = keep - pivots
    for n in range(pivots):
        share = -(-left // (pivots - n))
        left -= share
        far = (-near[:, n]).masked_fill(~good, -4.0).masked_fill(kept, -math.inf)  # cosines lie in -1..1
        kept = kept.scatter(1, far.argsort(dim=1, descending=True, stable=True)[:, :share], True)
    return kept.nonzero()[:, 1].view(-1, keep)


def stride(tokens: Tensor, relevance: Tensor | None, keep: int) -> Tensor:
    """Every N / keep-th token: the middles of `keep` equal parts of the sequence."""
    check(tokens, relevance, keep)
    place = torch.arange(keep, device=tokens.device)
    return ((2 * place + 1) * tokens.shape[1] // (2 * keep)).repeat(tokens.shape[0], 1)


def random(tokens: Tensor, relevance: Tensor | None, keep: int, *, seed: int = 0) -> Tensor:
    """Chance, with a seed: image b of a batch gets the b-th draw, the same on every device."""
    check(tokens, relevance, keep)
    if count(seed, "seed", 0) >= 2**63:
        raise ValueError(f"seed: expected seed < 2**63, got {seed}")
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(tokens.shape[:2], generator=generator)  # row by row: an image's draw is the same in any batch
    return top(score, keep).to(tokens.device)


def released_script(tokens: Tensor, relevance: Tensor | None, keep: int) -> Tensor:
    """The rule that Script's authors released (`script_kernels.reference.released_prune`), for their tables."""
    check(tokens, relevance, keep)
    from ..reference import released_prune

    return released_prune(tokens, ones(tokens) if relevance is None else relevance, keep)
