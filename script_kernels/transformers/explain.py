"""`explain`: what each stage of pruning found, for every token of every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from script_kernels import methods
from script_kernels.methods.dpp import script_stages
from script_kernels.methods.focus import focus_stages
from script_kernels.selection import Selection

from .device import clock_of, fetch, mark, milliseconds
from .families import unwrap
from .grids import grids_of, view_of
from .layouts import MODALITIES, Visual
from .prune import PrunedInputs, prune_inputs
from .select import Choice, relevance_by_unit, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGES = ("relevance", "gsp", "qcsp", "join")


@dataclass(frozen=True)
class Explanation:
    """What `prune_inputs` did, and why.

    pruned: what `prune_inputs` returns for the same arguments. images: a `Selection` for each entry of
    `pruned.keep_indices`: images, then videos. milliseconds: of the model's encoder ("encode"), of choosing as pruning
    does it ("select"), and of each stage that ran, alone and for all prompts ("relevance", "gsp", "qcsp", "join").
    """

    pruned: PrunedInputs
    images: list[Selection]
    milliseconds: dict[str, float]


@torch.no_grad()
def explain(model: PreTrainedModel, inputs: Mapping[str, Any], keep: int | None = None, **options: Any) -> Explanation:
    """Prunes as `prune_inputs` does, with the same arguments, and tells what each stage made of every token.

    The stages are those of the methods "script" and "focus", whose shares by relevance and of typical tokens are
    `taken` before GSP and QCSP. Other methods have a relevance, where the question has one, and what they keep. Without
    a query there is no relevance; where everything stays, no stage ran. On a GPU the stages are run again, one by one,
    and between equal tokens may choose another than the fused call, whose answer `kept` is.

    Args:
        model, inputs, keep, options: as for `prune_inputs`. A processor given as tokenizer also tells whether it cuts
            pictures.

    Returns:
        An `Explanation`.

    Raises:
        TypeError, ValueError, RuntimeError: as `prune_inputs`.
    """
    with watched() as choices:
        pruned = prune_inputs(model, inputs, keep, **options)
    model = unwrap(model)
    device = clock_of(model)
    times = {"encode": pruned.stats.vision_ms, "select": pruned.stats.select_ms}
    found: dict[int, dict[str, Any]] = {}
    for turn in range(2 if choices else 0):  # the first run compiles and warms up
        spent: dict[str, float] = {}
        for choice in choices:
            for visual, values in zip(choice.visuals, _explained(choice, device, spent), strict=True):
                found[id(visual)] = values
        if turn:
            times |= {name: spent[name] for name in STAGES if name in spent}
    visuals = [v for choice in choices for v in choice.visuals]
    visuals.sort(key=lambda v: (MODALITIES.index(v.modality), v.prompt))  # as keep_indices are ordered
    grids = grids_of(model, visuals, fetch(_small(inputs)), options.get("tokenizer"))
    images = [
        Selection(
            _name(visual, visuals), kept.numpy(), tuple(map(view_of, own)), len(visual.features), **found[id(visual)]
        )
        for visual, kept, own in zip(visuals, pruned.keep_indices, grids, strict=True)
    ]
    return Explanation(pruned, images, times)


def _small(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in inputs if name.endswith(("_thw", "_sizes", "_shapes"))}


def _name(visual: Visual, visuals: list[Visual]) -> str:
    mine = [v for v in visuals if (v.modality, v.prompt) == (visual.modality, visual.prompt)]
    number = next(i for i, v in enumerate(mine, 1) if v is visual)
    name = f"{visual.modality} {number}" if len(mine) > 1 else visual.modality
    return f"prompt {visual.prompt + 1}, {name}" if len({v.prompt for v in visuals}) > 1 else name


def _explained(choice: Choice, device: torch.device, spent: dict[str, float]) -> list[dict[str, Any]]:
    """Per visual, the fields of its `Selection`; adds each stage's milliseconds to `spent`."""
    budget, query, lengths, tokens = choice.budget, choice.query, choice.lengths, choice.tokens
    keeps = [budget.tokens(n) for n in lengths]
    marks = [("", mark(device))]
    score = relevance_by_unit(tokens, lengths, query, budget)
    if query is not None:
        marks.append(("relevance", mark(device)))
    sizes = [len(v.features) for v in choice.visuals]
    fields: dict[str, Tensor] = {}

    def lay(name: str, blank: Any, values: Tensor) -> None:
        """One value for each row that competed, and `blank` for the others."""
        full = torch.full((sum(sizes),), blank, dtype=values.dtype)
        fields[name] = full.index_copy_(0, choice.rows, values.cpu())

    if query is not None:
        lay("relevance", float("nan"), score)
    stages_of = {"script": script_stages, "focus": focus_stages}.get(str(budget.method))
    if stages_of is not None and keeps != lengths:
        options = (
            dict(budget.options) if budget.method == "script" else {**methods.options_of("focus"), **budget.options}
        )
        options["negate"] = False  # done by the relevance
        parts = []
        for part, own, facts, keep in zip(
            tokens.split(lengths), score.split(lengths), choice.facts, keeps, strict=True
        ):
            marks.append(("", mark(device)))
            stages = stages_of(
                part[None],
                None if query is None else own[None],
                keep,
                done=lambda name: marks.append((name, mark(device))),
                **options,
                **facts,
            )
            order, gains = stages.order[0], stages.gains[0]
            places = torch.arange(len(order), device=order.device)
            rank = torch.full((len(part),), -1, device=order.device).index_copy_(0, order, places)
            gain = torch.full((len(part),), float("nan"), device=order.device).index_copy_(0, order, gains)
            taken = torch.zeros_like(rank, dtype=torch.bool) if stages.taken is None else stages.taken[0]
            ranked = (rank.masked_fill(taken, -1), gain.masked_fill(taken, float("nan")))  # of no rank, though last
            parts.append((taken, stages.mask[0], stages.redundancy[0], *ranked))
        for name, blank, values in zip(
            ("taken", "survives", "redundancy", "order", "gain"),
            (False, True, float("nan"), -1, float("nan")),
            zip(*parts, strict=True),
            strict=True,
        ):
            lay(name, blank, torch.cat(values))
        if not fields["taken"].any():
            del fields["taken"]
    for (_, before), (name, after) in pairwise(marks):
        if name:
            spent[name] = spent.get(name, 0.0) + milliseconds(before, after)
    split = {name: [np.asarray(part) for part in values.split(sizes)] for name, values in fields.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(sizes))]
