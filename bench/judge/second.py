"""The second round: what the ops gained since the first, and a share of the tokens at even distances.

python -m bench.judge evaluate --seed 0 --split second     # its settings on the validation split
python -m bench.judge evaluate --seed 0 --split test2      # what RULE.md lets through, on scenes not seen before
python -m bench.judge report --split test2                 # results/test2.md; second.md likewise
"""

from typing import Any

import torch
from torch import Tensor

from script_kernels import max_min, methods, qcsp

from .evaluate import Setting, settings

GRAPH = {"survivors": 2.0, "combine": "restrict"}
DEFAULT = Setting("script", {**GRAPH, "floor": 0.3}, "words", "max")  # of the integrations, chosen by the first round


def _floored(tokens: Tensor, relevance: Tensor | None, floor: float) -> Tensor:
    r = tokens.new_ones(tokens.shape[:2]) if relevance is None else relevance
    return floor + (1 - floor) * r


def _max_min(tokens: Tensor, relevance: Tensor | None, keep: int, *, floor: float = 0.0) -> Tensor:
    return max_min(tokens, _floored(tokens, relevance, floor), keep)[0]


def _raw(tokens: Tensor, relevance: Tensor | None, keep: int, *, floor: float = 0.0) -> Tensor:
    return qcsp(tokens, _floored(tokens, relevance, floor), keep, normalize=False)[0]


def _uniform(tokens: Tensor, relevance: Tensor | None, keep: int, *, uniform: float, **options: Any) -> Tensor:
    """That share of `keep` at even distances, and the rest by `script` among the other tokens."""
    few, n = int(uniform * keep), tokens.shape[1]
    first = methods.select(tokens, None, few, method="stride")
    rest = torch.ones(n, dtype=torch.bool).index_fill(0, first[0], False).nonzero()[:, 0]
    own = None if relevance is None else relevance[:, rest]
    return torch.cat([first, rest[methods.select(tokens[:, rest], own, keep - few, **options)]], 1)


# Of the ops, but of no method: the relevance of max_min, QCSP on raw products with a floor, and the even share.
RULES: dict[str, methods.Method] = {"max_min": _max_min, "raw": _raw}


def rule_of(setting: Setting) -> str | methods.Method:
    if "relevant" in setting.options:
        from .fourth import shares

        return shares
    if "beside" in setting.options:
        from .fifth import focused

        return focused
    return _uniform if "uniform" in setting.options else RULES.get(setting.method, setting.method)


def second() -> list[Setting]:
    """What is tried, the present default first."""
    words: dict[str, Any] = {"source": "words", "reduce": "max"}
    pair: dict[str, Any] = {"source": "pair", "reduce": "max"}
    asked = [DEFAULT]
    asked += [Setting("script", {**GRAPH, "survivors": s, "floor": 0.3}, **words) for s in (1.5, 3.0, 4.0)]
    asked += [Setting("script", {**GRAPH, "mix": 0.8}, **words)]
    asked += [Setting("script", {**GRAPH, "floor": 0.1, "power": 0.5}, **words)]
    asked += [Setting("script", {**GRAPH, "floor": 0.3, "uniform": u}, **words) for u in (0.125, 0.25)]
    asked += [Setting("script", {**GRAPH, "mix": m, "uniform": 0.25}, **words) for m in (0.8, 0.9)]
    asked += [Setting("script", {**GRAPH, "mix": 0.8, "uniform": 0.375}, **words)]
    asked += [Setting("script", {"combine": "union", "floor": 0.3}, **words)]
    asked += [Setting("cdpruner", {"floor": 0.3, "ridge": 0.1}, **words)]
    asked += [Setting("raw", {"floor": 0.3}, **words), Setting("max_min", {"floor": 0.3}, **words)]
    # A floor f under the relevance of MMR is a balance b (1 - f) / (1 - b f), so that the balance alone is searched.
    asked += [Setting("mmr", {"balance": 0.1}, **words)]
    asked += [Setting("script", {**GRAPH, "mix": 0.8}, **pair)]
    asked += [Setting("script", {**GRAPH, "mix": 0.8, "uniform": 0.25}, **pair)]
    free = [Setting("dpp"), Setting("dpp", {"ridge": 0.1}), Setting("raw"), Setting("script", {"combine": "union"})]
    free += [Setting("script", {**GRAPH, "survivors": 3.0}), Setting("script", {**GRAPH, "uniform": 0.25})]
    return [*asked, *free]


def third() -> list[Setting]:
    """What the second round pointed to when its test split had been opened: a ridge. Nothing is concluded from it."""
    words: dict[str, Any] = {"source": "words", "reduce": "max"}
    found = [Setting("dpp"), DEFAULT]
    found += [Setting("script", {**GRAPH, "floor": 0.3, "ridge": ridge}, **words) for ridge in (0.03, 0.1, 0.3, 1.0)]
    found += [Setting("script", {**GRAPH, "survivors": 3.0, "floor": 0.3, "ridge": 0.3}, **words)]
    return [*found, *(Setting("cdpruner", {"floor": 0.3, "ridge": ridge}, **words) for ridge in (0.3, 1.0))]


def candidate() -> Setting:
    """Rule 7: of the settings on words, the one whose worst seed keeps most of the unpruned answers at 11 %."""
    from .report import most_kept

    return most_kept("second", second(), [s for s in second() if s.source == "words"])


def opened() -> list[Setting]:
    """Rule 8: what the second test split is opened for."""
    every = [*second(), *settings()]
    names = [
        candidate().name,
        DEFAULT.name,
        "script (survivors=2, combine=restrict)",
        "script (survivors=2, combine=restrict, uniform=0.25)",
        "script (combine=union)",
        "script (combine=union, floor=0.3, words, max)",
        "cdpruner (mix=0.8, words, max)",
        *("dpp", "divprune", "script", "stride", "random"),
        *("cdpruner (words)", "cdpruner (pair)", "relevance (evidence)"),
    ]
    return [next(s for s in every if s.name == name) for name in dict.fromkeys(names)]
