"""Runs the model's own encoders, finds each visual's placeholders, and packs the rows that stay."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .device import Mark, clock_of, mark, own_weights, send
from .families import family_of, parameters, token_id
from .layouts import MODALITIES, Visual
from .versions import repeats_groups, unrepeatable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inputs that the models' encoders read number by number: given from the CPU, they make nobody wait for the device.
_READ_BY_HOST = ("image_sizes", "batch_num_images")
# Of an encoder's output, what no language model reads: it would hold the unpruned features in memory.
_UNREAD = {"last_hidden_state", "hidden_states", "attentions", "image_hidden_states", "video_hidden_states"}


def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor, host: Mapping[str, Any] | None = None
) -> tuple[list[Visual], dict[str, Any], list[tuple[Mark, Mark]]]:
    """Encodes all images, then all videos, and finds each one's placeholders.

    ids, mask: (B, S) on the CPU. host: the inputs as `fetch` returns them, if they are not on the CPU. Returns the
    visuals, the encoder's output per modality and the marks before and after each run of the model's own encoders.
    """
    family = family_of(model)
    device = clock_of(model)
    host = inputs if host is None else host
    runs: list[tuple[Mark, Mark]] = []

    def run(modality: str) -> Any:
        if family.pixels.get(modality) not in inputs:
            return None
        encoder = getattr(model.base_model, f"get_{modality}_features")
        names = parameters(encoder)  # what `generate` passes on as well
        passed = {name: (host if name in _READ_BY_HOST else inputs)[name] for name in names if name in inputs}
        start = mark(device)
        with own_weights(model.base_model):
            out = encoder(**passed, return_dict=True)
        runs.append((start, mark(device)))
        return out

    unpadded = ids.masked_fill(mask == 0, -1)
    try:
        visuals, outputs = family.adapter(model, host, unpadded, run)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or re.match(r"[\w.\[\] ]+: expected ", str(error)):
            raise
        # Pixels and sizes that disagree end somewhere in the model's own encoder, in words that name neither.
        given = [name for name in inputs if name in family.pixels.values() or name.endswith(("_grid_thw", "_sizes"))]
        encoder = f"the vision encoder of {type(model).__name__}"
        raise ValueError(f"{', '.join(given)}: expected what {encoder} takes, got an error: {error}") from error
    for modality in outputs:
        mine = [v for v in visuals if v.modality == modality]
        _place(mine, _placeholders(model, unpadded, host.get("mm_token_type_ids"), modality))
    return visuals, outputs, runs


def _placeholders(model: PreTrainedModel, ids: Tensor, types: Tensor | None, modality: str) -> Tensor:
    """(B, S) bool: where a prompt stands for visual tokens."""
    as_images = family_of(model).as_images
    token = token_id(model, "image" if as_images else modality)
    if token is None:
        raise ValueError(
            f"model: expected a config with {modality}_token_id, got none in {type(model.config).__name__}"
        )
    if not as_images:
        return ids == token
    if types is None:
        raise ValueError("mm_token_type_ids: expected with this model, which has one placeholder for images and videos")
    return (ids == token) & (types == 1 + MODALITIES.index(modality))


def _place(visuals: list[Visual], placeholders: Tensor) -> None:
    prompt, column = placeholders.nonzero(as_tuple=True)
    ends = list(accumulate((len(v.features) for v in visuals), initial=0))
    if ends[-1] != len(prompt):
        raise ValueError(
            f"input_ids: expected {ends[-1]} {visuals[0].modality} placeholders, one per visual token, "
            f"got {len(prompt)}"
        )
    for visual, (start, end) in zip(visuals, pairwise(ends), strict=True):
        visual.prompt = int(prompt[start])
        if visual.prompt != int(prompt[end - 1]):
            raise ValueError(f"input_ids: expected each {visual.modality} inside one prompt, got one split over two")
        visual.columns = column[start:end]


def rebuild(outputs: dict[str, Any], visuals: list[Visual], kept: list[Tensor]) -> dict[str, Any]:
    """`mm_encoder_outputs` with the kept rows only, in the container each model's forward expects."""
    pruned = {}
    for modality, output in outputs.items():
        mine = [(v, send(k, v.features.device)) for v, k in zip(visuals, kept, strict=True) if v.modality == modality]
        prompts = [v.prompt for v, _ in mine]
        totals = [sum(len(k) for v, k in mine if v.prompt == prompt) for prompt in sorted(set(prompts))]
        tensors = isinstance(output.pooler_output, Tensor) and output.pooler_output.ndim > 2
        # An output class may demand what nobody reads.
        demanded = [f.name for f in fields(output) if f.default is MISSING and f.name in _UNREAD]
        kept_fields: dict[str, Any] = dict.fromkeys(demanded)
        kept_fields |= {name: value for name, value in output.items() if name not in _UNREAD}
        if output.pooler_output is not None:
            pooled = [v.features.index_select(0, k) for v, k in mine]
            flat = isinstance(output.pooler_output, Tensor) and not tensors
            kept_fields["pooler_output"] = (
                torch.cat(pooled) if flat else _stack(pooled, totals) if tensors else _entries(pooled, prompts)
            )
        if getattr(output, "deepstack_features", None) is not None:
            kept_fields["deepstack_features"] = [
                _like(layer, [v.planes[i].index_select(0, k) for v, k in mine], prompts, totals)
                for i, layer in enumerate(output.deepstack_features)
            ]
        kind: Any = type(output)
        if isinstance(output.pooler_output, Tensor) and len(set(totals)) > 1 and not repeats_groups():
            kind = unrepeatable(kind)
        pruned[modality] = kind(**kept_fields)
    return pruned


def _like(layer: Any, parts: list[Tensor], prompts: list[int], totals: list[int]) -> Any:
    """One layer's DeepStack features in the model's own container: a tensor, a list, or either with its layer."""
    if isinstance(layer, tuple) and isinstance(layer[0], int):
        return layer[0], _like(layer[1], parts, prompts, totals)
    return _stack(parts, totals) if isinstance(layer, Tensor) else _entries(parts, prompts)


def _entries(parts: list[Tensor], prompts: list[int]) -> list[Tensor]:
    """One entry per visual; one per prompt where beams would mix up the order of several."""
    if repeats_groups():
        return parts
    return [
        torch.cat([part for part, own in zip(parts, prompts, strict=True) if own == prompt])
        for prompt in sorted(set(prompts))
    ]


def _stack(pooled: list[Tensor], totals: list[int]) -> Tensor:
    """(L_i, D) pieces as one (pieces, length, D) tensor for the models that flatten it again.

    The length divides the rows of every prompt, so no piece crosses two; beam search relies on that when it repeats
    them.
    """
    return torch.cat(pooled).reshape(-1, math.gcd(*totals), pooled[0].shape[-1])
