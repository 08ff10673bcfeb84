"""What the methods share: checks, unit rows, and the relevance after power, floor and sign."""

import math

import torch
from torch import Tensor

from .. import checks, query_relevance
from ..options import check_split, checker_order


def check(tokens: Tensor, relevance: Tensor | None, keep: int) -> None:
    """Raises ValueError or TypeError for arguments that no method takes."""
    checks.max_min(tokens, relevance, keep)


def split_order(tokens: Tensor, split: str, grid_width: int | None) -> Tensor | None:
    """(N,) int64: the tokens in an order whose even places are GSP's first sources; None: as they come."""
    n = tokens.shape[1]
    check_split(n, split, grid_width)
    if grid_width is None or grid_width % 2:
        return None
    order: Tensor = checker_order(torch.arange(n, device=tokens.device), grid_width)
    return order


def ones(tokens: Tensor) -> Tensor:
    """A relevance of 1 for every token of (B, N, D)."""
    return tokens.new_ones(tokens.shape[:2], dtype=torch.float32)


def largest(tokens: Tensor) -> Tensor:
    """(B, N) float32: the largest magnitude of each token; one with a NaN or an Inf has that."""
    return torch.maximum(tokens.amax(-1), -tokens.amin(-1)).float()


def finite(tokens: Tensor) -> Tensor:
    """(B, N) bool: tokens without a NaN or an Inf."""
    return torch.isfinite(largest(tokens))


def blank(tokens: Tensor, which: Tensor) -> Tensor:
    """The tokens (B, N, D), of which those (B, N) are made zeros in place."""
    if tokens.device.type == "cpu":
        tokens[which] = 0.0  # ten times as fast as a mask that is spread over D
        return tokens
    return tokens.masked_fill_(which[..., None], 0.0)  # without a wait for how many there are


def unit(tokens: Tensor) -> Tensor:
    """Rows over their norms in float32; zero rows, and rows with a NaN or an Inf, become zeros."""
    size = largest(tokens)
    bad = ~(torch.isfinite(size) & (size > 0))
    x = blank(tokens.to(torch.float32, copy=True), bad)
    # By the largest first, as squares of the largest float32 would overflow. In place: each is a pass over memory.
    x.div_(size.masked_fill(bad, 1.0)[..., None])
    return x.div_(x.norm(dim=-1, keepdim=True).masked_fill_(bad[..., None], 1.0))


def top(score: Tensor, keep: int) -> Tensor:
    """The `keep` tokens of largest score (B, N), ascending; between equals the lower index, NaN last."""
    order = torch.nan_to_num(score, nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(1).values


def relevance_of(
    tokens: Tensor, query: Tensor, query_mask: Tensor | None = None, *, reduce: str = "mean", negate: bool = False
) -> Tensor:
    """Relevance (B, N) in [0, 1] of tokens (B, N, C) to query vectors (B or 1, Q, C), masked (B or 1, Q).

    `script_kernels.query_relevance` by the name that the integrations use: reduce "max" takes the largest cosine
    instead of the mean, so that one word that fits is not averaged away. "above" takes the largest of how far a cosine
    lies above the median of its word's over the image, so that a word that is near to everything hides no other.

    Raises:
        ValueError, TypeError: what `query_relevance` raises.
    """
    if reduce != "above":
        return query_relevance(tokens, query, query_mask, reduce=reduce, negate=negate)
    checks.query_relevance(tokens, query, query_mask, negate)
    good = finite(tokens)
    cosine = unit(tokens) @ unit(query).mT * (-1 if negate else 1)  # (B, N, Q)
    above = cosine - cosine.masked_fill(~good[..., None], math.nan).nanmedian(1, keepdim=True).values
    known = finite(query) if query_mask is None else finite(query) & query_mask
    score = above.masked_fill(~known[:, None], -math.inf).amax(2)
    low = score.masked_fill(~good, math.inf).amin(1, keepdim=True)
    high = score.masked_fill(~good, -math.inf).amax(1, keepdim=True)
    spread = high - low
    return torch.where(spread > 1e-6, (score - low) / spread.clamp(min=1e-6), 1.0).masked_fill(~good, 0.0)
