"""Greedy MAP of a determinantal point process on a ready kernel, in one launch for all steps of all images."""

import torch

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.plan import plan_stages
from .kernels.replay import replayed


@replayed
def launch_dpp_map(kernel: torch.Tensor, k: int, *, columns: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy MAP of (B, N, N) fp32 kernels of any strides: indices (B, k) int64 in greedy order, gains (B, k) fp32."""
    layout = Layout.of(kernel)
    (stage,), clear = plan_stages(kernel.device, layout, k, matrix_free=False, columns=columns)
    clear.zero_()
    return launch_greedy(layout, kernel, k, stage, kernel=kernel)
