"""Relevance of each token to the query: r_i = minmax_i(mean_q cos(a_i, q)).

Three launches: the mean unit query vector; one pass over the tokens, which gives cosines, norms and, by integer atomics
on order-preserving keys, the range of each image; the min-max. `prune` does the third inside its own kernels.
"""

import torch

from .kernels.layout import Layout
from .kernels.replay import replayed
from .kernels.rows import launch_mean_query, launch_min_max, launch_rows


@replayed
def launch_query_relevance(
    tokens: torch.Tensor, query: torch.Tensor, query_mask: torch.Tensor | None = None, negate: bool = False
) -> torch.Tensor:
    """Relevance (B, N) fp32 in [0, 1] of tokens (B, N, C) to a query (B or 1, Q, C)."""
    layout = Layout.of(tokens)
    if layout.rows == 0:
        return torch.empty(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
    mean = launch_mean_query(query, query_mask, negate, layout.segments)
    score = launch_rows(tokens, layout, mean, score=True).score
    assert score is not None
    return launch_min_max(score, mean.reach, layout).view(tokens.shape[:2])
