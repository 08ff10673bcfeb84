"""Farthest points first: the greedy steps of qcsp on S, with the nearest pick in place of a factor.

One launch more than qcsp finds each token's nearest other one, for the first pick.
"""

from typing import Any

import torch

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.nearest import launch_alone
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.rows import launch_rows
from .kernels.weights import max_min_weights, scaled_back


def launch_max_min(
    tokens: torch.Tensor,
    relevance: torch.Tensor | None,
    k: int,
    *,
    matrix_free: bool | None = None,
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, k) int64 of (B, N, D) tokens in the order of picking, gains (B, k) fp32; overrides as in qcsp."""
    layout = Layout.of(tokens)
    (stage,), clear = plan_stages(tokens.device, layout, k, matrix_free=matrix_free, columns=columns)
    rows = launch_rows(tokens, layout)
    ones = torch.ones_like(rows.inv_norm)
    kernel, own = None, None
    if stage.features:
        clear.zero_()
    else:
        _, kernel, own = launch_pairs(tokens, layout, rows, ones, width=layout.n, clear=clear)
    weight, good, exponent = max_min_weights(relevance, layout, rows)
    near = launch_alone(tokens, layout, rows, good, kernel, own)
    start = torch.where(good, weight * (1 - near.view_as(weight)).clamp(min=0), torch.nan)
    steps: dict[str, Any] = {
        "kernel": kernel,
        "tokens": tokens,
        "own": own,
        "start": start,
        "nearest": (weight, weight),
    }
    indices, gains = launch_greedy(layout, ones, k, stage, rows, **steps)
    return indices, scaled_back(gains, exponent)
