"""prune_varlen: `prune` of packed segments, in the launches of a dense batch and one more per 16 segments.

The extra launch puts the counts of `keep`, which are host integers, on the device, and makes the bounds of the segments
sound, whatever they are.
"""

from collections.abc import Sequence

import torch

from script_kernels.options import PruneOptions

from .kernels.choose import launch_place
from .kernels.layout import Layout
from .kernels.replay import replayed
from .prune import prune_layout


@replayed
def launch_prune_varlen(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    query: torch.Tensor | None,
    keep: Sequence[int],
    options: PruneOptions,
    *,
    aligned: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices (sum(keep),) int64 into the packed tokens (T, D), ascending within each segment."""
    if options.combine == "union":
        raise ValueError(
            "combine: expected 'intersect' or 'restrict' for packed segments on CUDA, got 'union', whose rounds follow "
            "from lengths that the host does not know"
        )
    if sum(keep) == 0:
        return torch.empty(0, dtype=torch.int64, device=tokens.device)
    counts, limits, bounds = launch_place(keep, cu_seqlens, options.oversample, tokens.shape[0])
    layout = Layout.of(tokens, bounds)
    return prune_layout(tokens, layout, query, keep, options, aligned=aligned, counts=counts, limits=limits)
