"""Relevance of each token to the query: r_i = minmax_i(mean_q cos(a_i, q)).

Three launches: the mean unit query vector; one pass over the tokens, which gives cosines, norms and, by integer atomics
on order-preserving keys, the range of each image; the min-max. `prune` does the third inside its own kernels. For the
largest cosine the norms of tokens and query take a launch each, and tiles of products one.
"""

import torch

from .kernels.layout import Layout
from .kernels.nearest import launch_score
from .kernels.replay import replayed
from .kernels.rows import launch_min_max


@replayed
def launch_query_relevance(
    tokens: torch.Tensor,
    query: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    negate: bool = False,
    reduce: str = "mean",
) -> torch.Tensor:
    """Relevance (B, N) fp32 in [0, 1] of tokens (B, N, C) to a query (B or 1, Q, C)."""
    layout = Layout.of(tokens)
    if layout.rows == 0:
        return torch.empty(tokens.shape[:2], dtype=torch.float32, device=tokens.device)
    rows, reach = launch_score(tokens, layout, query, query_mask, negate, reduce)
    assert rows.score is not None
    assert reach is not None
    return launch_min_max(rows.score, reach, layout).view(tokens.shape[:2])
