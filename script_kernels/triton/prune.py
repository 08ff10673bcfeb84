"""prune: relevance, GSP, QCSP and their intersection in six launches, whatever the batch.

1. the mean query vector; 2. one pass over the tokens: norms, raw relevance and its range; 3. one pass over the upper
triangle of S: a tile becomes L = diag(r) S diag(r) and, its even-odd half, the degrees and sums of GSP on both of its
sides; 4. GSP's choice; 5. the greedy ranking, which ends once it has met `keep` of GSP's tokens, for those are the
result; 6. the intersection. A further round of GSP takes two launches more, the largest cosine too, no query one less.
Packed segments (`prune_varlen`) run through the same kernels with the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from script_kernels.options import PruneOptions

from .kernels.choose import launch_intersect, launch_select
from .kernels.greedy import launch_greedy
from .kernels.layout import Layout
from .kernels.nearest import launch_score
from .kernels.pairs import launch_pairs
from .kernels.plan import plan_stages
from .kernels.replay import replayed
from .kernels.rows import PLANES


def prune_layout(
    tokens: torch.Tensor,
    layout: Layout,
    query: torch.Tensor | None,
    keep: Sequence[int],
    options: PruneOptions,
    *,
    aligned: torch.Tensor | None,
    query_mask: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept tokens of all images one after another. `keep` per segment, or one for all images of a dense batch;
    counts, limits: for packed segments, `keep` and the length of the ranking on the device, (S,) int32."""
    most = max(keep)
    total = sum(keep) if layout.packed else layout.segments * most
    k = options.ranked(layout.n, most)
    score = (query, query_mask, options.negate, options.reduce, aligned)
    rows, reach = launch_score(tokens, layout, *score, planes=PLANES)
    union, restrict = options.combine == "union", options.combine == "restrict"
    survivors = options.survivors(layout.n, most)
    # The walk ends once it has met as many of GSP's tokens as are wanted.
    picks = k if union else min(k, math.ceil(most * layout.n / survivors))
    stages, clear = plan_stages(tokens.device, layout, k, picks=picks)
    made: dict[str, Any] = {name: getattr(options, name) for name in ("threshold", "floor", "power")}
    relevance, kernel, own = launch_pairs(tokens, layout, rows, reach=reach, clear=clear, **made)
    graph = replace(options, rounds=options.rounds_to(layout.n, most))
    mask, _ = launch_select(tokens, layout, rows, graph, survivors, options.gsp_drop)
    stop = None if restrict or union else mask
    source: dict[str, Any] = {"kernel": kernel, "tokens": tokens, "own": own}
    ranking: Any = None
    for stage in stages:
        ranking = launch_greedy(
            *(layout, relevance, k, stage, rows),
            **source,
            tier=mask if restrict else None,
            stop=stop,
            need=0 if stop is None else most if counts is None else counts,
            limits=counts if restrict else limits,
            out=ranking,
        )
    return launch_intersect(ranking[0], layout, None if restrict else mask, most, total, counts, union=union)


@replayed
def launch_prune(
    tokens: torch.Tensor,
    query: torch.Tensor | None,
    keep: int,
    options: PruneOptions,
    *,
    aligned: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices (B, keep) int64, ascending, of the tokens (B, N, D) to keep."""
    layout = Layout.of(tokens)
    if layout.segments == 0:
        return torch.empty((0, keep), dtype=torch.int64, device=tokens.device)
    kept = prune_layout(tokens, layout, query, [keep], options, aligned=aligned, query_mask=query_mask)
    return kept.view(layout.segments, keep)
