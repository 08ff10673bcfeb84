"""Every source token (even position) against every destination token (odd position), with no similarity matrix.

Three launches: norms and cleared sums; degree, sums and best match, added up as integers; the five outputs.
"""

import torch

from .kernels.choose import launch_finish
from .kernels.layout import Layout
from .kernels.pairs import launch_match
from .kernels.replay import replayed
from .kernels.rows import PLANES, launch_rows


@replayed
def launch_bipartite_match(tokens: torch.Tensor, threshold: float = 0.2) -> tuple[torch.Tensor, ...]:
    """Best, match, degree, mean, density per source token of (B, N, D): each (B, ceil(N / 2))."""
    layout = Layout.of(tokens)
    rows = launch_rows(tokens, layout, planes=PLANES + 1)
    assert rows.sums is not None
    if layout.rows:
        launch_match(tokens, layout, rows, threshold, keep=layout.n)
    return launch_finish(rows.sums, layout)
