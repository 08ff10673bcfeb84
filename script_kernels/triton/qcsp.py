"""QCSP: greedy MAP of the DPP with kernel L = diag(r) S diag(r), from raw tokens and their relevance.

Up to WIDEST tokens L is built in memory and the greedy steps read its rows. Longer images never hold an N x N matrix: a
step computes the one row of L that it needs from the tokens, spread over the programs of the image. With a power, raw
rows or a ridge, weights and diagonal of the kernel are made first, one number per token.
"""

import torch

from script_kernels.options import QcspOptions

from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.replay import replayed
from .kernels.rows import launch_rows, launch_unit
from .kernels.weights import kernel_weights


@replayed
def launch_qcsp(
    tokens: torch.Tensor,
    relevance: torch.Tensor,
    k: int,
    options: QcspOptions | None = None,
    *,
    matrix_free: bool | None = None,
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy ranking of (B, N, D) tokens with (B, N) fp32 relevance: indices (B, k) int64, gains (B, k) fp32.

    Four launches, whatever k and B, where all programs fit on the device. `matrix_free` and `columns` override the
    dispatch; rows from L and rows from the tokens differ in rounding.
    """
    layout = Layout.of(tokens)
    (stage,), clear = plan_stages(tokens.device, layout, k, matrix_free=matrix_free, columns=columns)
    if stage.features:
        clear.zero_()
    rows = launch_rows(tokens, layout)
    plain = options is None or options == QcspOptions()
    start, weight = None, None
    if plain:
        relevance, unit = launch_unit(relevance, layout, rows)
    else:
        assert options is not None
        weight, start, unit = kernel_weights(relevance, layout, rows, options)
    kernel, own = None, None
    if not stage.features:
        weights = relevance if weight is None else weight
        _, kernel, own = launch_pairs(tokens, layout, rows, weights, width=layout.n, clear=clear)
    return launch_greedy(
        layout, relevance, k, stage, rows, kernel=kernel, tokens=tokens, own=own, unit=unit, start=start, weight=weight
    )
