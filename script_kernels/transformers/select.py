"""Which visual tokens of one prompt stay: units, budgets and one call of the pruning op, or of another method."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from script_kernels import methods, prune, prune_varlen
from script_kernels.calibrate import Calibration, Candidate
from script_kernels.options import REDUCE_BY_METHODS, check_name

from .device import send
from .layouts import Visual

OPTIONS = ("negate", "gsp_drop", "oversample", "combine", "threshold", "gamma", "min_degree", "rounds", "floor")
UNITS = ("image", "tile", "request")


@dataclass(frozen=True)
class Budget:
    """How many tokens stay of each unit. Exactly one of keep and keep_ratio is set."""

    keep: int | None = None
    keep_ratio: float | None = None
    per: str = "image"
    min_tokens: int = 1
    newlines: str = "drop"
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str | methods.Method | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.keep_ratio is None):
            raise ValueError(
                f"keep, keep_ratio: expected exactly one of the two, got keep={self.keep}, keep_ratio={self.keep_ratio}"
            )
        if self.keep is not None and (isinstance(self.keep, bool) or not isinstance(self.keep, int)):
            raise TypeError(f"keep: expected an int, got {type(self.keep).__name__}")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep: expected at least 1, got {self.keep}")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio: expected a number in (0, 1], got {self.keep_ratio}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 1:
            raise ValueError(f"min_tokens: expected an int of at least 1, got {self.min_tokens!r}")
        if self.per not in UNITS:
            raise ValueError(f"per: expected one of {', '.join(UNITS)}, got {self.per!r}")
        if self.newlines not in ("drop", "lines"):
            raise ValueError(f"newlines: expected 'drop' or 'lines', got {self.newlines!r}")
        if self.reduce is not None:
            check_name(self.reduce, "reduce", REDUCE_BY_METHODS)
        if self.method is not None:
            methods.get(self.method)
        if self.method is None or isinstance(self.method, str):
            known = list(methods.options_of(self.method))
            unknown = sorted(set(self.options) - set(known))
            if unknown:
                raise TypeError(f"options: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        methods.settled(self.method, self.options, self.reduce, asked=True)

    def settled(self, asked: bool) -> Budget:
        """With what it leaves open filled in, for a prompt that asks something or does not."""
        method, options, reduce = methods.settled(self.method, self.options, self.reduce, asked)
        if method == "script":  # knobs of the method that stand where the op has them need no method
            still = methods.options_of("script")
            options = {name: value for name, value in options.items() if name in OPTIONS or value != still[name]}
        return replace(self, method=method, options=options, reduce=reduce)

    @property
    def fused(self) -> bool:
        """Whether the op `prune` does it all: its own method, options and relevance."""
        own = self.method == "script" and self.reduce == "mean" and set(self.options) <= set(OPTIONS)
        return own and self.options.get("combine") != "union"

    def tokens(self, length: int) -> int:
        """Tokens that stay of a unit of `length`. A unit that has fewer than asked for stays whole."""
        # 1e-9 takes off rounding such as 0.1 * 30 = 3.0000000000000004.
        asked = self.keep if self.keep_ratio is None else math.ceil(self.keep_ratio * length - 1e-9)
        assert asked is not None
        return min(length, max(asked, self.min_tokens))


def explicit(candidate: Candidate) -> dict[str, Any]:
    """All options of a candidate, so that nothing is left open that `Budget.settled` would fill in."""
    return {**methods.options_of(candidate.method), **candidate.options, "negate": candidate.negate}


def settings(
    calibration: str | os.PathLike[str] | Calibration | None, keep: int | None, keep_ratio: float | None, query: Any
) -> dict[str, Any]:
    """The arguments of `prune_inputs` that a calibration, or the file it was saved in, stands for.

    Its `keep` counts where neither keep nor keep_ratio is given; a candidate that does without the question drops it.
    """
    if calibration is None:
        return {"keep": keep, "query": query}
    found = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    best = found.best
    return {
        "keep": found.keep if keep is None and keep_ratio is None else keep,
        "query": query if best.query else None,
        "method": best.method,
        "reduce": best.reduce,
        "options": explicit(best),
    }


@dataclass
class Choice:
    """What stays of one prompt's visuals, as soon as the device has worked it out.

    rows: rows of the concatenated features that competed, on the CPU, unit by unit, of `lengths`. chosen: places in
    rows that won, on the features' device. scores: per visual, (L,) fp32, NaN on newline rows, likewise. query:
    (1, Q, D). budget: with nothing left open. facts: what a method that asks is told of each unit.
    """

    visuals: list[Visual]
    rows: Tensor
    chosen: Tensor
    scores: list[Tensor]
    lengths: list[int]
    query: Tensor | None
    budget: Budget
    facts: list[dict[str, Any]]

    @property
    def tokens(self) -> Tensor:
        """The (N, D) features that competed."""
        features = _joined([v.features for v in self.visuals])
        return features.index_select(0, send(self.rows, features.device))


_watched: ContextVar[list[Choice] | None] = ContextVar("script_kernels_choices", default=None)


@contextmanager
def watched() -> Iterator[list[Choice]]:
    """The choices that are made in this block by its own thread or task, prompt by prompt."""
    choices: list[Choice] = []
    token = _watched.set(choices)
    try:
        yield choices
    finally:
        _watched.reset(token)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _units(visuals: list[Visual], per: str) -> tuple[Tensor, list[int]]:
    """Rows of the concatenated features that compete, ordered by unit, and the length of each unit."""
    # Newline rows are one learned vector, not image content: they never compete.
    rows = (~_joined([v.newline for v in visuals])).nonzero()[:, 0]
    if per == "request" or (per == "image" and len(visuals) == 1):
        return rows, [len(rows)]
    unit, offset = [], 0
    for visual in visuals:
        own = visual.tile + offset if per == "tile" else torch.full_like(visual.tile, offset)
        offset = int(own.max()) + 1
        unit.append(own)
    # Sorted, as a line of patches runs through several tiles.
    label, order = torch.cat(unit)[rows].sort(stable=True)
    return rows[order], label.unique_consecutive(return_counts=True)[1].tolist()


def _prune_units(
    tokens: Tensor,
    lengths: list[int],
    keeps: list[int],
    query: Tensor | None,
    score: Tensor,
    budget: Budget,
    facts: list[dict[str, Any]],
) -> Tensor:
    """Kept rows of packed units (sum(lengths), D), ascending within each; query (1, Q, D) is shared."""
    if all(k == n for k, n in zip(keeps, lengths, strict=True)):
        return torch.arange(len(tokens), device=tokens.device)
    if not budget.fused:
        return _by_method(tokens, lengths, keeps, None if query is None else score, budget, facts)
    options = budget.options
    if len(set(lengths)) == 1 and len(set(keeps)) == 1:
        kept = prune(tokens.view(len(lengths), lengths[0], -1), query, keeps[0], **options)
        if len(lengths) > 1:
            kept = kept + torch.arange(0, len(tokens), lengths[0], device=tokens.device)[:, None]
        return kept.flatten()
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    queries = None if query is None else query.expand(len(lengths), -1, -1)
    return prune_varlen(tokens, send(ends, tokens.device), queries, keeps, **options)


def _by_method(
    tokens: Tensor,
    lengths: list[int],
    keeps: list[int],
    score: Tensor | None,
    budget: Budget,
    facts: list[dict[str, Any]],
) -> Tensor:
    """What `_prune_units` gives, by a method of its own. `score` has the sign of `negate` already."""
    assert budget.method is not None
    options = {name: value for name, value in budget.options.items() if name != "negate"}
    method = methods.get(budget.method)
    alike = len(set(lengths)) == 1 and len(set(keeps)) == 1
    if isinstance(budget.method, str) and alike and all(f.get("grids") == facts[0].get("grids") for f in facts):
        units = tokens.view(len(lengths), lengths[0], -1)
        told = {
            name: _joined([f[name] for f in facts]) if isinstance(value, Tensor) else value
            for name, value in facts[0].items()
        }
        kept = method(units, None if score is None else score.view(units.shape[:2]), keeps[0], **options, **told)
        return (kept + torch.arange(0, len(tokens), lengths[0], device=tokens.device)[:, None]).flatten()
    scores = [None] * len(lengths) if score is None else [s[None] for s in score.split(lengths)]
    found, start = [], 0
    for part, own, known, keep in zip(tokens.split(lengths), scores, facts, keeps, strict=True):
        kept = methods.select(part[None], own, keep, method=budget.method, **options, **known)[0]
        found.append(start + kept)
        start += len(part)
    return _joined(found)


def _facts(
    tokens: Tensor, lengths: list[int], rows: Tensor, visuals: list[Visual], query: Tensor | None, budget: Budget
) -> list[dict[str, Any]]:
    """What the method asks to know of each unit: a second relevance, and the grids in which its tokens lie."""
    assert budget.method is not None
    asked = methods.facts_of(budget.method)
    if query is None or not asked:
        return [{} for _ in lengths]
    parts = [part for visual in visuals for part in visual.grids]
    shift = list(accumulate((len(v.features) for v in visuals), initial=0))
    held = [part.rows + start for visual, start in zip(visuals, shift, strict=False) for part in visual.grids]
    edge = list(accumulate(map(len, held), initial=0))
    order = _joined(held) if held else rows[:0]
    found = []
    for unit, end in zip(tokens.split(lengths), accumulate(lengths), strict=True):
        begin = end - len(unit)
        known: dict[str, Any] = dict.fromkeys(asked)
        if begin in edge and end in edge and torch.equal(order[begin:end], rows[begin:end]):
            shapes = [part.shape for part in parts[edge.index(begin) : edge.index(end)]]
            known["grids"] = shapes if all(shapes) else None
        if known["grids"] is not None:  # without, nothing is chosen by it
            how = {"reduce": "above", "negate": budget.options.get("negate", False)}
            known["above"] = methods.relevance_of(unit[None], query, **how)
        found.append(known)
    return found


def relevance_by_unit(tokens: Tensor, lengths: list[int], query: Tensor | None, budget: Budget) -> Tensor:
    """(N,) fp32 of packed units (N, D), scaled within each."""
    if query is None:
        return torch.ones(len(tokens), dtype=torch.float32, device=tokens.device)
    how = {"reduce": budget.reduce, "negate": budget.options.get("negate", False)}
    return _joined([methods.relevance_of(part[None], query, **how)[0] for part in tokens.split(lengths)])


def _newlines(visual: Visual, kept: Tensor, rule: str) -> Tensor:
    """kept (L,) bool without newlines -> with those that stay."""
    if bool((kept | visual.newline).all()):
        return torch.ones_like(kept)
    if rule == "drop":
        return kept
    alive = torch.zeros(int(visual.line.max()) + 2, dtype=torch.bool)
    alive[visual.line[kept & (visual.line >= 0)]] = True
    return kept | (visual.newline & alive[visual.line])


def choose(visuals: list[Visual], query: Tensor | None, budget: Budget) -> Choice:
    """Has the device choose among one prompt's visuals; does not wait for it."""
    budget = budget.settled(query is not None)
    rows, lengths = _units(visuals, budget.per)
    features = _joined([v.features for v in visuals])
    tokens, place = features, None
    if len(rows) < len(features) or budget.per == "tile":
        place = send(rows, features.device)
        tokens = features.index_select(0, place)
    keeps = [budget.tokens(n) for n in lengths]
    score = relevance_by_unit(tokens, lengths, query, budget)
    by_row = score
    if place is not None:
        score = torch.full((len(features),), float("nan"), device=features.device).index_copy_(0, place, score)
    facts = [{} for _ in lengths] if keeps == lengths else _facts(tokens, lengths, rows, visuals, query, budget)
    chosen = _prune_units(tokens, lengths, keeps, query, by_row, budget, facts)
    scores = list(score.split([len(v.features) for v in visuals]))
    choice = Choice(visuals, rows, chosen, scores, lengths, query, budget, facts)
    looked_on = _watched.get()
    if looked_on is not None:
        looked_on.append(choice)
    return choice


def kept_rows(choices: list[Choice], newlines: str) -> list[list[Tensor]]:
    """Per choice and visual, the rows that stay: ascending int64, on the CPU."""
    if not choices:
        return []
    # The one wait for what the device has chosen, for all prompts at once.
    chosen = _joined([c.chosen for c in choices]).cpu().split([len(c.chosen) for c in choices])
    kept_rows = []
    for choice, own in zip(choices, chosen, strict=True):
        sizes = [len(v.features) for v in choice.visuals]
        kept = torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, choice.rows[own], True)
        masks = [_newlines(v, k, newlines) for v, k in zip(choice.visuals, kept.split(sizes), strict=True)]
        kept_rows.append([m.nonzero()[:, 0] for m in masks])
    return kept_rows
