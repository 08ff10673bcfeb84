"""The proof that a model's type which nobody tested can be pruned.

Keeping everything must change nothing; with half of the rows, the language model must get the embeddings of the
unpruned prompt at the columns that stay; and other rows in the same places must give other logits.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .families import parameters
from .layouts import Visual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_passed: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
# From the rows that each visual keeps, and those whose features it gets, to the call and each prompt's kept columns.
Build = Callable[[list[Tensor], list[Tensor]], tuple[dict[str, Any], list[Tensor]]]


def _last_logits(model: PreTrainedModel, inputs: Mapping[str, Any], ends: list[int]) -> Tensor:
    """(B, V) logits of each prompt's last token."""
    few = "logits_to_keep" in parameters(type(model).forward) and all(end == -1 for end in ends)
    # An empty context: a block of script_pruning around this call must not prune the unpruned side.
    out = contextvars.Context().run(lambda: model(**inputs, **({"logits_to_keep": 1} if few else {})))
    return torch.stack([row[end] for row, end in zip(out.logits, ends, strict=True)])


@contextmanager
def _embeddings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What the parts of the model get as `inputs_embeds` (B, S, D), the outermost part first."""
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            seen.append(kwargs["inputs_embeds"].detach())

    parts = [m for m in model.base_model.modules() if m is not model.base_model]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in parts if "inputs_embeds" in _takes(m)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _takes(module: torch.nn.Module) -> tuple[str, ...]:
    return parameters(type(module).forward)


def _bound(logits: Tensor) -> float:
    low = logits.dtype in (torch.bfloat16, torch.float16)
    return (4 * torch.finfo(logits.dtype).eps if low else 1e-5) * max(1.0, float(logits.abs().max()))


def _halves(visuals: list[Visual]) -> tuple[list[Tensor], list[Tensor]]:
    """Per visual: half of its rows, ascending, drawn without regard to where they stand; and as many of the others."""
    generator = torch.Generator().manual_seed(0)
    ordered = [torch.randperm(len(v.features), generator=generator) for v in visuals]
    sizes = [max(1, len(rows) // 2) for rows in ordered]
    return (
        [rows[:size].sort().values for rows, size in zip(ordered, sizes, strict=True)],
        [rows[-size:] for rows, size in zip(ordered, sizes, strict=True)],
    )


def _alike(visuals: list[Visual]) -> bool:
    """Whether no visual has two rows that differ, so that nothing tells which of them were taken."""
    return all(bool((part == part[:1]).all()) for v in visuals for part in (v.features, *v.planes))


def check_family(
    model: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor, visuals: list[Visual], build: Build
) -> None:
    """Raises RuntimeError unless the model can be pruned as its family says; once for each model.

    `build` with all rows must give the logits of `inputs`, to 1e-5 (in bfloat16 and float16 to four units in the last
    place of the largest logit). With half of the rows the language model must get the embeddings of the unpruned prompt
    at the columns that stay, bit for bit, and other rows in their places must change the logits. Visuals whose rows are
    all alike show nothing of the kind: they pass, and the next call checks again.
    """
    if model in _passed:
        return
    kind = f"{type(model).__name__} with model_type {model.config.model_type!r}"
    told = "script_kernels.transformers.register_family says how such a model is pruned"
    deltas = getattr(model.base_model, "rope_deltas", None)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    last = [int(row.nonzero()[-1]) - len(row) for row in mask]
    end = [-1] * len(mask)

    def run(kept: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        data, columns = build(kept, rows)
        with _embeddings(model) as seen:
            logits = _last_logits(model, {**data, "labels": None}, end)
        return logits, next((e for e in seen if e.shape[:2] == data["input_ids"].shape), None), columns

    try:
        expected = _last_logits(model, inputs, last)
        everything = [torch.arange(len(v.features)) for v in visuals]
        half, others = _halves(visuals)
        try:
            got, whole, all_columns = run(everything, everything)
            some, part, columns = run(half, half)
            exchanged, _, _ = run(half, others)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise RuntimeError(
                f"model: expected one that takes its own features back, got {kind}, which fails on them ({error}); "
                f"{told}"
            ) from error
    finally:
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = deltas
    difference = float((expected.float() - got.float()).abs().max())
    if not difference <= _bound(expected):
        raise RuntimeError(
            f"model: expected the unpruned logits when everything is kept, got {kind}, where they differ by "
            f"{difference:.2g}; {told}"
        )
    if whole is not None and part is not None:
        for row, short, before, kept in zip(whole, part, all_columns, columns, strict=True):
            places = torch.searchsorted(before, kept).to(whole.device)
            if not torch.equal(short[-len(kept) :], row[-len(before) :][places]):
                raise RuntimeError(
                    f"model: expected the unpruned embeddings at the tokens that stay, got {kind}, whose language "
                    f"model gets others; {told}"
                )
    if _alike(visuals):
        return
    if torch.equal(some, exchanged):
        raise RuntimeError(
            f"model: expected other logits from other features, got {kind}, which answers the same; {told}"
        )
    _passed.add(model)
