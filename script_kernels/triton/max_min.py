"""Farthest points first: the greedy steps of qcsp on S, with the nearest pick in place of a factor.

One launch more than qcsp finds each token's nearest other one, for the first pick.
"""

import torch

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.nearest import launch_alone
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.replay import replayed
from .kernels.rows import launch_rows
from .kernels.weights import max_min_weights


@replayed
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
    if stage.features:
        clear.zero_()
    rows = launch_rows(tokens, layout)
    weight, ones, unit = max_min_weights(relevance, layout, rows)
    kernel, own = None, None
    if not stage.features:
        _, kernel, own = launch_pairs(tokens, layout, rows, ones, width=layout.n, clear=clear)
    start = launch_alone(tokens, layout, rows, weight, kernel, own)
    nearest = (weight, weight)
    return launch_greedy(
        layout, ones, k, stage, rows, kernel=kernel, tokens=tokens, own=own, unit=unit, start=start, nearest=nearest
    )
