"""Positions of a pruned prompt: one row for 1-D rotary models, four (text, time, height, width) for mRoPE ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .families import family_of, parameters, token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of get_rope_index that its model's forward takes by another name.
INPUT_OF = {"second_per_grids": "video_second_per_grid"}


def full_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Positions that the unpruned prompt would get: (1, B, S) or, for mRoPE, (3, B, S); 0 on padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not family_of(model).has_mrope(model):
        return _text_positions(mask)[None]
    types = inputs.get("mm_token_type_ids")
    if types is None:  # the processor's rule: 1 on image placeholders, 2 on video placeholders
        types = (ids == token_id(model, "image")).int() + 2 * (ids == token_id(model, "video")).int()
    rope_index = model.base_model.get_rope_index
    names = parameters(rope_index)
    known = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": mask}
    known = {name: value for name, value in known.items() if name in names}
    extra = {name: inputs[INPUT_OF.get(name, name)] for name in names if INPUT_OF.get(name, name) in inputs}
    return rope_index(**(extra | known))[0]


def _text_positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def pruned_positions(
    model: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor, columns: list[Tensor], renumber: bool
) -> tuple[Tensor, Tensor | None]:
    """Consecutive positions, or the full prompt's at each one's kept columns, right-aligned under `mask` (B, S').

    All on the CPU. Returns position_ids, (B, S') or (4, B, S') with contiguous text positions in row 0 (gaps there
    would be read as packed sequences), and for mRoPE the `rope_deltas` (B, 1) from which decoding goes on.
    """
    text = _text_positions(mask)
    if renumber:
        if not family_of(model).has_mrope(model):
            return text, None
        return text.expand(4, *text.shape).contiguous(), torch.zeros_like(text[:, :1])
    full = full_positions(model, inputs)
    rows = full.shape[0]
    gathered = torch.zeros(rows, *text.shape, dtype=text.dtype)
    for prompt, kept in enumerate(columns):
        gathered[:, prompt, text.shape[1] - len(kept) :] = full[:, prompt, kept]
    if rows == 1:
        return gathered[0], None
    lengths = torch.tensor([[len(kept)] for kept in columns])
    # Padding is 0 in `full`, so the maximum is over the prompt's own tokens.
    deltas = full.amax(dim=(0, 2))[:, None] + 1 - lengths
    return torch.cat([text[None], gathered]), deltas
