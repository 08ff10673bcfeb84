"""Greedy rules on the largest similarity to what is kept: farthest points first, and maximal marginal relevance."""

import math

import torch
from torch import Tensor

from ._common import check, finite, number, ones, unit


def max_min_order(tokens: Tensor, k: int) -> Tensor:
    """Farthest points first, (B, k) in the order taken.

    First the token whose nearest other token is farthest, then always the one farthest from all that are taken, by
    1 - cosine. Tokens with a NaN or an Inf come last; between equals the lower index is first.
    """
    x, good = unit(tokens), finite(tokens)
    B, N, _ = x.shape
    near = x @ x.mT
    other = ~torch.eye(N, dtype=torch.bool, device=x.device) & good[:, None, :]
    distance = 1 - near.masked_fill(~other, -math.inf).amax(-1)
    picks = []
    free = torch.ones(B, N, dtype=torch.bool, device=x.device)
    for t in range(k):
        key = torch.where(good, distance, -8.0).masked_fill(~free, -math.inf)  # distances lie in 0..2
        pick = key.argmax(1, keepdim=True)
        free.scatter_(1, pick, False)
        row = 1 - near.gather(1, pick[:, :, None].expand(-1, 1, N)).squeeze(1)
        distance = row if t == 0 else torch.minimum(distance, row)
        picks.append(pick)
    return torch.cat(picks, 1)


def mmr_order(tokens: Tensor, relevance: Tensor, k: int, balance: float) -> Tensor:
    """Largest balance * r - (1 - balance) * (largest cosine to what is taken) first, (B, k) in the order taken."""
    x, good = unit(tokens), finite(tokens) & torch.isfinite(relevance)
    B, N, _ = x.shape
    nearest = torch.zeros(B, N, device=x.device)
    picks = []
    free = torch.ones(B, N, dtype=torch.bool, device=x.device)
    for t in range(k):
        score = balance * relevance - (1 - balance) * nearest
        key = torch.where(good, score, torch.finfo(torch.float32).min).masked_fill(~free, -math.inf)
        pick = key.argmax(1, keepdim=True)
        free.scatter_(1, pick, False)
        row = (x @ x.gather(1, pick[:, :, None].expand(-1, 1, x.shape[2])).mT).squeeze(2)
        nearest = row if t == 0 else torch.maximum(nearest, row)
        picks.append(pick)
    return torch.cat(picks, 1)


def divprune(tokens: Tensor, relevance: Tensor | None, keep: int) -> Tensor:
    """DivPrune (arXiv 2503.02175): greedy max-min distance; see `max_min_order`."""
    check(tokens, relevance, keep)
    return max_min_order(tokens, keep).sort(1).values


def mmr(tokens: Tensor, relevance: Tensor | None, keep: int, *, balance: float = 0.5) -> Tensor:
    """Maximal marginal relevance (Carbonell and Goldstein 1998); see `mmr_order`."""
    check(tokens, relevance, keep)
    balance = number(balance, "balance", 0.0, 1.0)
    return mmr_order(tokens, ones(tokens) if relevance is None else relevance, keep, balance).sort(1).values
