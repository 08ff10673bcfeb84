"""The fourth round: a relevance of words above their usual cosine, of a patch's surroundings, and a budget in shares.

python -m bench.judge evaluate --seed 0 --split fourth     # its settings on other scenes of the validation pictures
python -m bench.judge evaluate --seed 0 --split test3      # what RULE.md lets through, on scenes not seen before
python -m bench.judge report --split test3                 # results/test3.md; fourth.md likewise
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from script_kernels import methods

from .evaluate import Setting
from .scenes import GRID
from .second import DEFAULT, GRAPH

HALF = {"relevant": 0.5, "near": 2, **GRAPH}


def centred(tokens: Tensor, words: Tensor, known: Tensor) -> Tensor:
    """Relevance (B, N): the largest of how far a cosine lies above the median of its word's over the image.

    tokens (B, N, D), words (B, Q, D), known (B, Q) bool. Without it a word that is near to everything hides the others.
    """
    cosine = F.normalize(tokens.float(), dim=-1) @ F.normalize(words.float(), dim=-1).mT
    above = cosine - cosine.median(1, keepdim=True).values
    score = above.masked_fill(~known[:, None], -torch.inf).amax(2)
    least, most = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return torch.where(most - least > 1e-6, (score - least) / (most - least).clamp(min=1e-6), 1.0)


def surroundings(relevance: Tensor, near: int) -> Tensor:
    """The mean of a relevance (B, N) over the square of 2 near + 1 patches a side, as far as it lies in the image."""
    grid = relevance.view(-1, 1, GRID, GRID)
    return F.avg_pool2d(grid, 2 * near + 1, stride=1, padding=near, count_include_pad=False).flatten(1)


def shares(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    relevant: float,
    near: int,
    even: float = 0.0,
    **options: Any,
) -> Tensor:
    """Shares of `keep` by relevance and at even distances among the others; the rest by `script` without a question."""
    assert relevance is not None
    found = methods.select(tokens, surroundings(relevance, near), int(relevant * keep), method="relevance")
    for count, rule, how in ((int(even * keep), "stride", {}), (keep, "script", options)):
        count = min(count, keep - found.shape[1])
        if count:
            free = torch.ones(tokens.shape[:2], dtype=torch.bool).scatter(1, found, False)
            rest = free.nonzero()[:, 1].view(len(tokens), -1)
            rows = tokens.gather(1, rest[..., None].expand(-1, -1, tokens.shape[2]))
            found = torch.cat([found, rest.gather(1, methods.select(rows, None, count, method=rule, **how))], 1)
    return found


def candidates() -> list[Setting]:
    return [
        Setting("script", HALF, "words", "centred"),
        Setting("script", {**HALF, "even": 0.125}, "words", "centred"),
    ]


def fourth() -> list[Setting]:
    """The candidates, each of their parts left out, and what to compare with."""
    return [
        DEFAULT,
        Setting("script", {**GRAPH, "floor": 0.3, "ridge": 0.3}, "words", "max"),
        *candidates(),
        Setting("script", HALF, "words", "max"),
        Setting("script", {**HALF, "near": 0}, "words", "centred"),
        Setting("script", {**GRAPH, "floor": 0.3}, "words", "centred"),
        Setting("dpp"),
    ]


def candidate() -> Setting:
    """Rule 11: the candidate whose worst seed keeps most of the unpruned answers at 11 %."""
    from .report import most_kept

    return most_kept("fourth", fourth(), candidates())


def opened() -> list[Setting]:
    """Rule 12: what the third test split is opened for."""
    return [*fourth(), Setting("cdpruner", source="pair"), Setting("relevance", source="evidence")]
