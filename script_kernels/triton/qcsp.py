"""QCSP: greedy MAP of the DPP with kernel L = diag(r) S diag(r), from raw tokens and their relevance.

Up to WIDEST tokens L is built in memory and the greedy steps read its rows. Longer images never hold an N x N matrix: a
step computes the one row of L that it needs from the tokens, spread over the programs of the image.
"""

import torch

from .dpp_map import launch_greedy, plan_greedy
from .kernel_matrix import launch_kernel_matrix
from .tokens import launch_token_stats

WIDEST = 8192  # L of a longer image is not kept in memory


def launch_qcsp(
    tokens: torch.Tensor,
    relevance: torch.Tensor,
    k: int,
    *,
    matrix_free: bool | None = None,
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy ranking of (B, N, D) tokens with (B, N) fp32 relevance: indices (B, k) int64, gains (B, k) fp32.

    Three launches, whatever k and B, where all programs fit on the device. `matrix_free` and `columns` override the
    dispatch; rows from L and rows from the tokens differ in rounding.
    """
    batch, n, _ = tokens.shape
    if matrix_free is None:
        matrix_free = n > WIDEST
    plan = plan_greedy(tokens.device, batch, n, k, features=matrix_free, columns=columns)
    slots = plan.slot_buffer(tokens.device)
    inv_norm, scale = launch_token_stats(tokens)
    kernel = None
    if matrix_free:
        slots.zero_()
    else:
        kernel = launch_kernel_matrix(tokens, relevance, inv_norm, scale, clear=slots)
    return launch_greedy(relevance, k, plan, slots, kernel=kernel, tokens=tokens, inv_norm=inv_norm, scale=scale)
