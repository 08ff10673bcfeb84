"""Which visual tokens of one prompt stay: units, budgets and one call of the pruning op."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from script_kernels import prune, prune_varlen, query_relevance

from .models import Visual

OPTIONS = ("negate", "gsp_drop", "oversample", "combine", "threshold", "gamma", "min_degree", "rounds")
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
        unknown = sorted(set(self.options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"options: expected some of {', '.join(OPTIONS)}, got {', '.join(unknown)}")

    def tokens(self, length: int) -> int:
        """Tokens that stay of a unit of `length`. A unit that has fewer than asked for stays whole."""
        # 1e-9 takes off rounding such as 0.1 * 30 = 3.0000000000000004.
        asked = self.keep if self.keep_ratio is None else math.ceil(self.keep_ratio * length - 1e-9)
        assert asked is not None
        return min(length, max(asked, self.min_tokens))


def _units(visuals: list[Visual], per: str) -> tuple[Tensor, list[int]]:
    """Rows of the concatenated features that compete, ordered by unit, and the length of each unit."""
    unit, offset = [], 0
    for visual in visuals:
        own = {"image": torch.zeros_like(visual.tile), "tile": visual.tile, "request": None}[per]
        if own is None:
            own = torch.zeros_like(visual.tile)
        else:
            own = own + offset
            offset = int(own.max()) + 1
        # Newline rows are one learned vector, not image content: they never compete.
        unit.append(own.masked_fill(visual.newline, -1))
    label = torch.cat(unit)
    rows = (label >= 0).nonzero()[:, 0]
    rows = rows[label[rows].argsort(stable=True)]
    return rows, label[rows].unique_consecutive(return_counts=True)[1].tolist()


def _prune_units(
    tokens: Tensor, lengths: list[int], keeps: list[int], query: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Kept rows of packed units (sum(lengths), D), ascending within each; query (1, Q, D) is shared."""
    if all(k == n for k, n in zip(keeps, lengths, strict=True)):
        return torch.arange(len(tokens), device=tokens.device)
    starts = torch.tensor([0, *lengths], device=tokens.device).cumsum(0)
    if len(set(lengths)) == 1 and len(set(keeps)) == 1:
        kept = prune(tokens.view(len(lengths), lengths[0], -1), query, keeps[0], **options)
        return (kept + starts[:-1, None]).flatten()
    queries = None if query is None else query.expand(len(lengths), -1, -1)
    return prune_varlen(tokens, starts.int(), queries, keeps, **options)


def _relevance(tokens: Tensor, lengths: list[int], query: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    if query is None:
        return torch.ones(len(tokens), dtype=torch.float32, device=tokens.device)
    negate = options.get("negate", False)
    return torch.cat([query_relevance(part[None], query, negate=negate)[0] for part in tokens.split(lengths)])


def _newlines(visual: Visual, kept: Tensor, rule: str) -> Tensor:
    """kept (L,) bool without newlines -> with those that stay."""
    content = ~visual.newline
    if bool(kept[content].all()):
        return torch.ones_like(kept)
    if rule == "drop":
        return kept
    alive = torch.zeros(int(visual.line.max()) + 2, dtype=torch.bool)
    alive[visual.line[kept & (visual.line >= 0)]] = True
    return kept | (visual.newline & alive[visual.line])


def select(visuals: list[Visual], query: Tensor | None, budget: Budget) -> tuple[list[Tensor], list[Tensor]]:
    """Kept rows (ascending int64, CPU) and scores ((L,) fp32, NaN on newline rows) of one prompt's visuals."""
    rows, lengths = _units(visuals, budget.per)
    features = torch.cat([v.features for v in visuals]) if len(visuals) > 1 else visuals[0].features
    place = rows.to(features.device)
    whole = len(rows) == len(features) and bool((rows[1:] > rows[:-1]).all())
    tokens = features if whole else features[place]
    keeps = [budget.tokens(n) for n in lengths]
    chosen = _prune_units(tokens, lengths, keeps, query, budget.options).cpu()
    score = torch.full((len(features),), float("nan"), device=features.device)
    score[place] = _relevance(tokens, lengths, query, budget.options)
    kept = torch.zeros(len(features), dtype=torch.bool)
    kept[rows[chosen]] = True
    sizes = [len(v.features) for v in visuals]
    masks = [_newlines(v, k, budget.newlines) for v, k in zip(visuals, kept.split(sizes), strict=True)]
    return [m.nonzero()[:, 0] for m in masks], list(score.split(sizes))
