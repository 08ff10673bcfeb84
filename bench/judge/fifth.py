"""The fifth round: a share by relevance that depends on the question and on the budget, and a few typical tokens.

python -m bench.judge evaluate --seed 0 --split fifth      # its settings on other scenes of the validation pictures
python -m bench.judge evaluate --seed 0 --split test4      # what RULE.md lets through, on scenes not seen before
python -m bench.judge report --split test4                 # results/test4.md; fifth.md likewise
python -m bench.judge evaluate --seed 0 --split test5 --images 240     # the method `focus`, as the package first had it
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from script_kernels import methods
from script_kernels.options import FEW, FULL, WARMTH

from .evaluate import Setting
from .fourth import HALF, surroundings
from .second import DEFAULT, GRAPH

TYPICAL = 0.125
FOCUS = {"beside": "centred", "least": 0.5, "most": 0.625, **GRAPH, "floor": 0.3}


def spread(tokens: Tensor, relevance: Tensor) -> Tensor:
    """A relevance (B, N) averaged over the tokens (B, N, D) that are like each one, over its range; without a grid."""
    rows = F.normalize(tokens.float(), dim=-1)
    mean = (torch.softmax(rows @ rows.mT / WARMTH, 2) @ relevance[..., None])[..., 0]
    least, largest = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
    return torch.where(largest - least > 1e-6, (mean - least) / (largest - least).clamp(min=1e-6), 1.0)


def whole(keep: int, tokens: int) -> float:
    """How much of the shares a budget is given: none where tokens are few, all of it where they are enough."""
    return min(max((keep / tokens - FEW) / (FULL - FEW), 0.0), 1.0)


def wanted(alike: Tensor, keep: int, least: float, most: float) -> Tensor:
    """Tokens (B,) that are chosen by relevance: twice those that are above half of its range, within bounds.

    Where these are more than are kept the relevance points nowhere, and gets half of the lower bound.
    """
    above = (alike > 0.5).sum(1)
    share = (2.0 * above).clamp(least * keep, most * keep)
    return (torch.where(above <= keep, share, least * keep / 2) * whole(keep, alike.shape[1])).long()


def typical(tokens: Tensor, relevance: Tensor | None, keep: int) -> Tensor:
    """The tokens of largest cosine to the mean of the image's directions: what most of it looks like."""
    rows = F.normalize(tokens.float(), dim=-1)
    return methods.select(tokens, (rows @ rows.mean(1)[..., None])[..., 0], keep, method="relevance")


def focused(
    tokens: Tensor,
    relevance: Tensor | None,
    keep: int,
    *,
    beside: Tensor,
    least: float,
    most: float,
    alike: bool = True,
    plain: float = TYPICAL,
    near: int = 2,
    **options: Any,
) -> Tensor:
    """`wanted` tokens by the relevance `beside`, a share `plain` of typical ones, the rest by `script` with `options`.

    alike: whether `beside` is spread over what is like a token before it is over its surroundings.
    """
    seen = spread(tokens, beside)
    counts = wanted(seen, keep, least, most)
    score = surroundings(seen * seen if alike else beside, near)
    few = int(plain * keep * whole(keep, tokens.shape[1]))
    kept = torch.empty(len(tokens), keep, dtype=torch.int64)
    for count in counts.unique().tolist():  # images of one count are chosen together
        at = (counts == count).nonzero()[:, 0]
        found = torch.empty(len(at), 0, dtype=torch.int64)
        some = tokens[at]
        steps: list[tuple[int, str | methods.Method, Tensor | None, dict[str, Any]]] = [
            (count, "relevance", score[at], {}),
            (few, typical, None, {}),
            (keep - count - few, "script", None if relevance is None else relevance[at], options),
        ]
        for number, rule, own, how in steps:
            if number:
                free = torch.ones(some.shape[:2], dtype=torch.bool).scatter(1, found, False)
                rest = free.nonzero()[:, 1].view(len(at), -1)
                rows = some.gather(1, rest[..., None].expand(-1, -1, some.shape[2]))
                own = None if own is None else own.gather(1, rest)
                found = torch.cat([found, rest.gather(1, methods.select(rows, own, number, method=rule, **how))], 1)
        kept[at] = found
    return kept


def candidates() -> list[Setting]:
    return [
        Setting("script", FOCUS, "words", "max"),
        Setting("script", {**FOCUS, "most": 0.75}, "words", "max"),
        Setting("script", FOCUS, "words", "centred"),
    ]


def fifth() -> list[Setting]:
    """The candidates, each of their parts left out, and what to compare with."""
    return [
        DEFAULT,
        *candidates(),
        Setting("script", {**FOCUS, "plain": 0.0}, "words", "max"),
        Setting("script", {**FOCUS, "most": 0.5}, "words", "max"),
        Setting("script", {**FOCUS, "alike": False}, "words", "max"),
        Setting("script", HALF, "words", "centred"),
        Setting("dpp"),
    ]


def candidate() -> Setting:
    """Rule 15: the candidate whose worst seed keeps most of the unpruned answers at 11 %."""
    from .report import most_kept

    return most_kept("fifth", fifth(), candidates())


def opened() -> list[Setting]:
    """Rule 16: what the fourth test split is opened for; nothing is chosen by the one without a grid."""
    without_grid = Setting("script", {**FOCUS, "near": 0}, "words", "max")
    return [*fifth(), without_grid, Setting("cdpruner", source="pair"), Setting("relevance", source="evidence")]


def confirmed() -> list[Setting]:
    """Rule 18: what the fifth test split is opened for: the third candidate, beside what it is compared with."""
    return [
        DEFAULT,
        dataclasses.replace(candidates()[2], label="focus (grid_width=24, words, centred)"),
        *(Setting(name) for name in ("dpp", "divprune", "random")),
        Setting("cdpruner", source="pair"),
        Setting("relevance", source="evidence"),
    ]
