"""Greedy rules on the largest similarity to what is kept: farthest points first, and maximal marginal relevance."""

from torch import Tensor

from .. import max_min
from .. import mmr as marginal_relevance
from ..options import number
from ._common import check, ones


def divprune(tokens: Tensor, relevance: Tensor | None, keep: int) -> Tensor:
    """DivPrune (arXiv 2503.02175): greedy max-min distance; see `script_kernels.max_min`."""
    check(tokens, relevance, keep)
    return max_min(tokens, None, keep)[0].sort(1).values


def mmr(tokens: Tensor, relevance: Tensor | None, keep: int, *, balance: float = 0.5) -> Tensor:
    """Maximal marginal relevance (Carbonell and Goldstein 1998); see `script_kernels.mmr`."""
    check(tokens, relevance, keep)
    balance = number(balance, "balance", 0.0, 1.0)
    r = ones(tokens) if relevance is None else relevance
    return marginal_relevance(tokens, r, keep, balance=balance)[0].sort(1).values
