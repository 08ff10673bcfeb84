"""Ids, masks, grids and pixels that do not fit each other: refused by the name of an argument, or pruned to inputs that
do fit; whatever comes, the model is afterwards what it was."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlm import IMAGE, IMAGE_FAMILIES, SIZES, VIDEO, Image, make_inputs

from script_kernels.transformers import prune_inputs, script_pruning

# How our own messages begin: the argument, what was expected.
NAMED = re.compile(r"^[\w.,\[\] ]+: expected ")
SIZED = ("image_grid_thw", "image_sizes", "batch_num_images")


def spoil(inputs: dict, draw) -> dict:
    """The inputs with one thing changed that makes them disagree, or not."""
    out = dict(inputs)
    ids = inputs["input_ids"].clone()
    flat = ids.view(-1)
    place = draw(st.integers(0, flat.numel() - 1))
    kinds = ["id", "more ids", "mask", "mask shape", "mask dtype", "pixels", "no pixels", "nan", "sizes", "fewer sizes"]
    kind = draw(st.sampled_from(kinds))
    if kind == "id":
        flat[place] = draw(st.sampled_from([7, IMAGE, VIDEO]))
        out["input_ids"] = ids
    elif kind == "more ids":
        flat[place : place + draw(st.integers(1, 40))] = draw(st.sampled_from([7, IMAGE]))
        out["input_ids"] = ids
    elif kind == "mask":
        mask = inputs["attention_mask"].clone()
        mask.view(-1)[place : place + draw(st.integers(1, 40))] = draw(st.sampled_from([0, 1]))
        out["attention_mask"] = mask
    elif kind == "mask shape":
        out["attention_mask"] = inputs["attention_mask"][:, draw(st.integers(1, 5)) :]
    elif kind == "mask dtype":
        out["attention_mask"] = inputs["attention_mask"].to(draw(st.sampled_from([torch.bool, torch.float32])))
    elif kind == "pixels":
        out["pixel_values"] = inputs["pixel_values"][: draw(st.integers(0, len(inputs["pixel_values"]) - 1))]
    elif kind == "no pixels":
        del out["pixel_values"]
    elif kind == "nan":
        out["pixel_values"] = torch.full_like(inputs["pixel_values"], float("nan"))
    else:
        names = [name for name in SIZED if name in inputs]
        if not names:
            return out
        name = draw(st.sampled_from(names))
        sizes = torch.as_tensor(inputs[name]).clone()
        if kind == "sizes":
            sizes.view(-1)[draw(st.integers(0, sizes.numel() - 1))] = draw(st.sampled_from([0, 1, 2, 3, 7, -4, 50]))
        else:
            sizes = sizes[:-1]
        out[name] = sizes.tolist() if isinstance(inputs[name], list) else sizes
    return out


def trace(model) -> dict:
    return dict(model.__dict__.items()) | dict(model.model.__dict__.items())


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_inputs_that_disagree(family: str, data: st.DataObject) -> None:
    one, other = SIZES[family]
    prompts = data.draw(st.sampled_from([[[4, one, 6]], [[3, one, 2], [5]], [[3, one, 2], [2, other, 4]]]))
    model, good = make_inputs(family, prompts)
    inputs = spoil(good, data.draw)
    expected = prune_inputs(model, good, 5, query=None).keep_indices
    before = trace(model)
    before.pop("rope_deltas", None)
    patched = data.draw(st.booleans())
    refusal = None
    try:
        if patched:
            with script_pruning(model, 5, query=None):
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
        else:
            pruned = prune_inputs(model, inputs, 5, query=None)
            assert pruned["input_ids"].shape == pruned["attention_mask"].shape
            lost = [0] * len(inputs["input_ids"])
            if pruned.keep_indices:
                lost = (inputs["attention_mask"].sum(1) - pruned["attention_mask"].sum(1)).tolist()
            assert min(lost) >= 0
    except (ValueError, TypeError) as error:
        refusal = str(error)
    assert refusal is None or NAMED.match(refusal), refusal
    after = trace(model)
    after.pop("rope_deltas", None)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    again = prune_inputs(model, good, 5, query=None).keep_indices
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_a_message_without_a_name_is_seen() -> None:
    assert NAMED.match("input_ids: expected 36 image placeholders, one per visual token, got 35")
    assert not NAMED.match("shape '[1, 4]' is invalid for input of size 3")
    assert make_inputs("llava", [[Image()]])
