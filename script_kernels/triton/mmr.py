"""Maximal marginal relevance: the greedy steps of qcsp on S, with the nearest pick in place of a factor."""

import torch

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.replay import replayed
from .kernels.rows import launch_rows
from .kernels.weights import mmr_weights


@replayed
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
    if stage.features:
        clear.zero_()
    rows = launch_rows(tokens, layout)
    start, offset, slope, ones, unit = mmr_weights(relevance, balance, layout, rows)
    kernel, own = None, None
    if not stage.features:
        _, kernel, own = launch_pairs(tokens, layout, rows, ones, width=layout.n, clear=clear)
    nearest = (offset, slope)
    return launch_greedy(
        layout, ones, k, stage, rows, kernel=kernel, tokens=tokens, own=own, unit=unit, start=start, nearest=nearest
    )
