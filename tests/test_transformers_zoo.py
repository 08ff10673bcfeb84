"""Every type of model that is claimed: pruned inputs against the unpruned model, on tiny random models."""

from __future__ import annotations

import pathlib

import pytest
import torch
import vlm_types
import vlm_zoo
from vlm_checks import hold_pruning
from vlm_zoo import IMAGE, feature_rows, make_inputs, make_model

from script_kernels.transformers import Family, prune_inputs
from script_kernels.transformers.families import _OWN_GENERATE, _PIXELS, FAMILIES, REFUSED, parameters

KEEP = 3
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "transformers.md"


@pytest.mark.parametrize("kind", vlm_types.PROVEN)
@torch.no_grad()
def test_a_type_is_pruned_right(kind):
    vlm_types.skip_before(kind)
    model = make_model(kind)
    inputs = make_inputs(model, kind)
    pruned = hold_pruning(model, inputs, "image", feature_rows(vlm_zoo.features(model, inputs)), KEEP)
    assert pruned.stats.visual_after == [KEEP]
    assert int((pruned["input_ids"] == IMAGE).sum()) == KEEP

    both = make_inputs(model, kind, 2)
    together = prune_inputs(model, both, KEEP)
    logits = model(**together).logits[:, -1]
    for i in range(2):
        one = prune_inputs(model, vlm_zoo.alone(both, i), KEEP)
        assert torch.equal(one.keep_indices[0], together.keep_indices[i])
        torch.testing.assert_close(model(**one).logits[0, -1], logits[i], atol=2e-4, rtol=2e-4)


def test_the_check_sees_token_types_that_do_not_come_along(monkeypatch):
    """Gemma 3's image tokens see each other, by token_type_ids."""
    monkeypatch.setitem(FAMILIES, "gemma3", Family("Gemma 3", along=()))
    model = make_model("gemma3")
    with pytest.raises(RuntimeError, match="expected the unpruned logits when everything is kept"):
        prune_inputs(model, make_inputs(model, "gemma3"), KEEP)


@torch.no_grad()
def test_videos_of_llava_next_video_are_frames_without_newlines():
    model = make_model("llava_next_video")
    pixels = torch.randn(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    count = len(feature_rows(model.model.get_video_features(pixels, return_dict=True)))
    ids = torch.tensor([[1, 20, 21, *[vlm_zoo.VIDEO] * count, 30, 31]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    expected = model(**inputs).logits
    assert torch.equal(model(**prune_inputs(model, inputs, 10**6)).logits, expected)
    pruned = prune_inputs(model, inputs, 1, per="tile")
    per_frame = count // 3
    assert [int(i) // per_frame for i in pruned.keep_indices[0]] == [0, 1, 2]
    assert float((model(**pruned).logits[0, -1] - expected[0, -1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["granite4_vision", "llava_next_video"])
@torch.no_grad()
def test_newline_rows_do_not_compete(kind):
    vlm_types.skip_before(kind)
    model = make_model(kind)
    inputs = make_inputs(model, kind)
    rows = feature_rows(vlm_zoo.features(model, inputs))
    lines = (rows == model.model.image_newline).all(1)
    assert int(lines.sum()) > 1
    patches = len(rows) - int(lines.sum())
    # All that compete stay, and so do the newlines.
    assert prune_inputs(model, inputs, patches).keep_indices[0].tolist() == list(range(len(rows)))
    pruned = prune_inputs(model, inputs, patches - 1)
    assert len(pruned.keep_indices[0]) == patches - 1
    assert not lines[pruned.keep_indices[0]].any()
    assert torch.equal(pruned.scores[0].isnan(), lines)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_all_that_a_prompt_shows_is_one_image_of_a_tiled_type(kind):
    """Their prompts put ids of the tokenizer between the tiles of a picture as between pictures."""
    model = make_model(kind)
    one = make_inputs(model, kind)
    per_tile = int((one["input_ids"] == IMAGE).sum())
    pixels = torch.randn(1, 3, *one["pixel_values"].shape[2:], generator=torch.Generator().manual_seed(5))
    shown = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 3, *pixels.shape[-2:], dtype=torch.bool)}

    def prompt(*between):
        run = [IMAGE] * per_tile
        ids = torch.tensor([[1, 20, *run, *between, *run, *between, *run, 30, 31]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}

    pruned = prune_inputs(model, prompt(40), 2)
    assert [len(k) for k in pruned.keep_indices] == [2]
    tiles = prune_inputs(model, prompt(40), 2, per="tile")
    assert (tiles.keep_indices[0] // per_tile).tolist() == [0, 0, 1, 1, 2, 2]
    assert int((tiles["input_ids"] == 40).sum()) == 2  # what stands between them stays
    with torch.no_grad():
        whole = prune_inputs(model, prompt(40), 10**6)
        assert torch.equal(model(**whole).logits, model(**prompt(40)).logits)


def test_the_documentation_holds_the_table_of_types():
    """`python tests/vlm_types.py` writes both parts anew."""
    text = PAGE.read_text()
    assert vlm_types.table() in text
    assert vlm_types.untested() in text
    assert vlm_types.refusals() in text


def test_each_type_is_proven_refused_or_named_with_the_reason_why_not():
    known = [*vlm_types.PROVEN, *REFUSED, *vlm_types.UNTESTED]
    assert len(known) == len(set(known))
    if vlm_types.VERSION <= (5, 24):  # a later one may have types that nobody has looked at
        assert set(vlm_zoo.TYPES) - set(known) == set()


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_the_reason_of_a_refusal_is_still_true(kind):
    names = {"phi4_multimodal": "Phi4MultimodalForCausalLM"} | vlm_zoo.TYPES
    if kind not in names:
        pytest.skip("a type of another mapping, or of another version")
    name = names[kind]
    model = getattr(vlm_zoo.transformers, name if isinstance(name, str) else name[0])
    reason = REFUSED[kind]
    if reason in (_PIXELS, "it takes no pictures"):
        assert "mm_encoder_outputs" not in parameters(model.forward)
    if reason == _OWN_GENERATE:
        assert "pixel_values" in parameters(model.generate)
        assert "mm_encoder_outputs" not in parameters(model.generate)


@pytest.mark.parametrize("kind", ["llama4", "mllama"])
def test_a_type_that_cannot_be_pruned_is_refused_with_the_reason(kind):
    name = vlm_zoo.TYPES[kind]
    model = object.__new__(getattr(vlm_zoo.transformers, name if isinstance(name, str) else name[0]))
    torch.nn.Module.__init__(model)
    model.config = vlm_zoo.CONFIG_MAPPING[kind]()
    with pytest.raises(TypeError, match=f"can be pruned, got .*'{kind}': its "):
        prune_inputs(model, {"input_ids": torch.ones(1, 3)}, 4)
