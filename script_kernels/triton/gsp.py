"""Graph-structured pruning: scores the source tokens by their redundancy and drops the highest, round by round.

One launch for norms and cleared sums, and two a round: degree and sums of the sources; the choice among them.
"""

import torch

from script_kernels.options import GspOptions

from .kernels.choose import launch_select
from .kernels.layout import Layout
from .kernels.pairs import launch_match
from .kernels.replay import replayed
from .kernels.rows import PLANES, launch_rows


@replayed
def launch_gsp(tokens: torch.Tensor, keep: int, options: GspOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (B, N) bool of exactly `keep` tokens per image and redundancy (B, N) fp32."""
    layout = Layout.of(tokens)
    shape = tokens.shape[:2]
    if layout.rows == 0:
        return tokens.new_empty(shape, dtype=torch.bool), tokens.new_empty(shape, dtype=torch.float32)
    rows = launch_rows(tokens, layout, planes=PLANES)
    launch_match(tokens, layout, rows, options.threshold, keep=keep, rounds=options.rounds)
    mask, redundancy = launch_select(tokens, layout, rows, options, keep)
    return mask.view(shape), redundancy.view(shape)
