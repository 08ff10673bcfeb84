"""The proof that a model's type which nobody tested can be pruned: keeping everything must change nothing."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .families import parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_passed: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _last_logits(model: PreTrainedModel, inputs: Mapping[str, Any], ends: list[int]) -> Tensor:
    """(B, V) logits of each prompt's last token."""
    few = "logits_to_keep" in parameters(type(model).forward) and all(end == -1 for end in ends)
    # An empty context: a block of script_pruning around this call must not prune the unpruned side.
    out = contextvars.Context().run(lambda: model(**inputs, **({"logits_to_keep": 1} if few else {})))
    return torch.stack([row[end] for row, end in zip(out.logits, ends, strict=True)])


def check_keep_all(
    model: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor, keep_all: Callable[[], Mapping[str, Any]]
) -> None:
    """Raises RuntimeError unless `keep_all()` gives the logits of `inputs`, to 1e-5; once for each model.

    In bfloat16 and float16 the bound is four units in the last place of the largest logit.
    """
    if model in _passed:
        return
    kind = f"{type(model).__name__} with model_type {model.config.model_type!r}"
    told = "script_kernels.transformers.register_family says how such a model is pruned"
    deltas = getattr(model.base_model, "rope_deltas", None)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    last = [int(row.nonzero()[-1]) - len(row) for row in mask]
    try:
        expected = _last_logits(model, inputs, last)
        try:
            got = _last_logits(model, {**keep_all(), "labels": None}, [-1] * len(mask))
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise RuntimeError(
                f"model: expected one that takes its own features back, got {kind}, which fails on them ({error}); "
                f"{told}"
            ) from error
    finally:
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = deltas
    low = expected.dtype in (torch.bfloat16, torch.float16)
    bound = (4 * torch.finfo(expected.dtype).eps if low else 1e-5) * max(1.0, float(expected.abs().max()))
    difference = float((expected.float() - got.float()).abs().max())
    if not difference <= bound:
        raise RuntimeError(
            f"model: expected the unpruned logits when everything is kept, got {kind}, where they differ by "
            f"{difference:.2g}; {told}"
        )
    _passed.add(model)
