"""Maximal marginal relevance: the greedy steps of qcsp on S, with the nearest pick in place of a factor."""

from typing import Any

import torch

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.rows import launch_rows
from .kernels.weights import mmr_weights


def launch_mmr(
    tokens: torch.Tensor,
    relevance: torch.Tensor,
    k: int,
    balance: float = 0.5,
    *,
    matrix_free: bool | None = None,
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, k) int64 of (B, N, D) tokens in the order of picking, scores (B, k) fp32; overrides as in qcsp."""
    layout = Layout.of(tokens)
    (stage,), clear = plan_stages(tokens.device, layout, k, matrix_free=matrix_free, columns=columns)
    rows = launch_rows(tokens, layout)
    ones = torch.ones_like(rows.inv_norm)
    kernel, own = None, None
    if stage.features:
        clear.zero_()
    else:
        _, kernel, own = launch_pairs(tokens, layout, rows, ones, width=layout.n, clear=clear)
    start, offset, slope, exponent, base = mmr_weights(relevance, balance, layout, rows)
    steps: dict[str, Any] = {"kernel": kernel, "tokens": tokens, "own": own, "start": start, "nearest": (offset, slope)}
    indices, gains = launch_greedy(layout, ones, k, stage, rows, **steps)
    # The first score is the relevance alone; later ones count from that of a least relevant token that equals a pick.
    score = gains.double() * torch.exp2(exponent) + base
    score[:, 1:] -= 1 - balance
    most = torch.finfo(torch.float32).max
    good = ~torch.isnan(start).gather(1, indices)
    return indices, torch.where(good, score.clamp(-most, most), 0.0).float()
