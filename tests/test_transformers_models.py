"""Pruned inputs against the unpruned model and against a decoding loop written out by hand, for each model family."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import (
    IMAGE,
    IMAGE_FAMILIES,
    PAD,
    SIZES,
    VIDEO,
    VIDEO_FAMILIES,
    Image,
    Video,
    make_inputs,
)

from script_kernels.transformers import prune_inputs
from script_kernels.transformers.encode import encode

ALL = 10**6
CASES = [(family, "image") for family in IMAGE_FAMILIES] + [(family, "video") for family in VIDEO_FAMILIES]


def prompt(family: str, kind: str = "image") -> list:
    return [4, SIZES[family][0], 6] if kind == "image" else [3, Video(), 7]


def features(model, inputs) -> list[torch.Tensor]:
    """Rows of every image, then of every video, from the model itself, one (L, D) per modality's whole batch."""
    names = {
        "image": ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    found = []
    for modality, keys in names.items():
        given = {key: inputs[key] for key in keys if key in inputs}
        if keys[0] in given:
            with torch.no_grad():
                out = getattr(model.model, f"get_{modality}_features")(**given)
            found.append((out.pooler_output, getattr(out, "deepstack_features", None)))
    return found


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_keep_all_equals_the_unpruned_model_exactly(family, kind):
    model, inputs = make_inputs(family, [prompt(family, kind)])
    with torch.no_grad():
        expected = model(**inputs).logits
    pruned = prune_inputs(model, inputs, ALL)
    with torch.no_grad():
        assert torch.equal(model(**pruned).logits, expected)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**pruned, max_new_tokens=6, do_sample=False), tokens)
    assert pruned.stats.visual_before == pruned.stats.visual_after


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_keep_all_of_a_padded_batch_equals_the_unpruned_model_exactly(family):
    small, large = SIZES[family]
    model, inputs = make_inputs(family, [[4, small, 6], [2, large, 9]])
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    pruned = prune_inputs(model, inputs, keep_ratio=1.0)
    assert torch.equal(pruned["input_ids"], inputs["input_ids"])
    assert torch.equal(pruned["attention_mask"], inputs["attention_mask"])
    assert torch.equal(model.generate(**pruned, max_new_tokens=5, do_sample=False), expected)


def decode_by_hand(model, family: str, inputs: dict, pruned, positions: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding without cache, generate or mm_encoder_outputs: embeddings, kept features and positions only.

    One prompt. positions: (P, S') of the pruned prompt, P = 1 or 3.
    """
    ids = inputs["input_ids"][0]
    columns = [i for i, token in enumerate(ids.tolist()) if token not in (IMAGE, VIDEO)]
    kept_rows, kept_planes, offset = [], [], 0
    for (pooled, deep), token in zip(features(model, inputs), [t for t in (IMAGE, VIDEO) if t in ids], strict=True):
        places = (ids == token).nonzero()[:, 0]
        parts = list(pooled) if family != "internvl" else [torch.cat(list(pooled))]
        start = 0
        for i, part in enumerate(parts):
            keep = pruned.keep_indices[offset]
            columns += places[start + keep].tolist()
            kept_rows.append(part[keep])
            kept_planes.append([plane[i][keep] for plane in deep or []])
            start += len(part)
            offset += 1
    columns.sort()
    short = ids[columns]
    embeds = model.get_input_embeddings()(short)
    visual = (short == IMAGE) | (short == VIDEO)
    embeds[visual] = torch.cat(kept_rows)
    extra = {}
    if kept_planes[0]:
        extra["deepstack_visual_embeds"] = [torch.cat(planes) for planes in zip(*kept_planes, strict=True)]
    new = []
    for _ in range(steps):
        if extra:
            extra["visual_pos_masks"] = torch.cat([visual, torch.zeros(len(new), dtype=torch.bool)])[None]
        position_ids = positions[0][None] if len(positions) == 1 else positions[:, None]
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            position_ids=position_ids,
            use_cache=False,
            **extra,
        ).last_hidden_state
        new.append(int(model.lm_head(hidden[0, -1]).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([new[-1]]))])
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.tensor(new)


@pytest.mark.parametrize("mode", ["original", "renumber"])
@pytest.mark.parametrize(("family", "kind"), CASES)
@torch.no_grad()
def test_cached_generate_equals_decoding_without_cache(family, kind, mode):
    model, inputs = make_inputs(family, [prompt(family, kind)])
    pruned = prune_inputs(model, inputs, 7, positions=mode)
    length = pruned["input_ids"].shape[1]
    if mode == "renumber":
        positions = torch.arange(length).expand(3 if family.startswith("qwen") else 1, -1)
    else:
        full = torch.arange(inputs["input_ids"].shape[1])[None]
        if family.startswith("qwen"):
            grids = {k: v for k, v in inputs.items() if k.endswith("_thw") or k == "second_per_grid_ts"}
            full = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)[0][:, 0]
        ids = inputs["input_ids"][0]
        visual = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
        columns = (~torch.isin(torch.arange(len(ids)), visual)).nonzero()[:, 0]
        positions = full[:, torch.cat([columns, visual[pruned.keep_indices[0]]]).sort()[0]]
    expected = decode_by_hand(model, family, inputs, pruned, positions, steps=8)
    out = model.generate(**pruned, max_new_tokens=8, do_sample=False)
    assert out[0, length:].tolist() == expected.tolist()
    unpruned = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:]
    assert unpruned.tolist() != expected.tolist()  # the comparison can tell pruned from unpruned


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_rope_deltas_carry_a_manual_decoding_loop(family):
    """A loop that passes no positions after the prefill relies on the model's rope_deltas."""
    model, inputs = make_inputs(family, [prompt(family)])
    pruned = prune_inputs(model, inputs, 7)
    expected = model.generate(**pruned, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    pruned = prune_inputs(model, inputs, 7)
    out = model(**pruned, use_cache=True)
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < 6:
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == expected


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_second_turn_goes_on_from_the_cache(family):
    """generate on the first answer plus new text, with the cache, equals one prefill of everything."""
    model, inputs = make_inputs(family, [prompt(family)])
    pruned = prune_inputs(model, inputs, 7)
    first = model.generate(**pruned, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    text = torch.randint(10, 180, (1, 5), generator=torch.Generator().manual_seed(3))
    longer = torch.cat([first.sequences, text], 1)
    second = model.generate(input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    position_ids = pruned["position_ids"]
    extra = longer.shape[1] - position_ids.shape[-1]
    steps = torch.arange(1, extra + 1).view(*[1] * (position_ids.ndim - 1), -1)
    whole = dict(pruned.items()) | {
        "input_ids": longer,
        "attention_mask": torch.ones_like(longer),
        "position_ids": torch.cat([position_ids, position_ids[..., -1:] + steps], -1),
    }
    assert IMAGE not in longer[0, -extra:]
    assert torch.equal(model.generate(**whole, max_new_tokens=4, do_sample=False), second)


def alone(family: str, both: dict, prompts: list[list], i: int) -> dict:
    """The inputs of prompt i of a batch, without padding."""
    before = [p for parts in prompts[:i] for p in parts if not isinstance(p, int)]
    mine = [p for p in prompts[i] if not isinstance(p, int)]
    valid = both["attention_mask"][i].bool()
    part = {k: both[k][i : i + 1, valid] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in both}
    items = slice(len(before), len(before) + len(mine))
    rows = items
    for modality in ("image", "video"):
        if f"{modality}_grid_thw" in both:
            part[f"{modality}_grid_thw"] = both[f"{modality}_grid_thw"][items]
            ends = [0, *both[f"{modality}_grid_thw"].prod(1).cumsum(0).tolist()]
            rows = slice(ends[items.start], ends[items.stop])
    if family == "internvl":
        start = sum(p.height * p.width for p in before)
        rows = slice(start, start + sum(p.height * p.width for p in mine))
    part |= {k: both[k][rows] for k in ("pixel_values", "pixel_values_videos") if k in both}
    part |= {k: both[k][items] for k in ("image_sizes", "second_per_grid_ts") if k in both}
    if "batch_num_images" in both:
        part["batch_num_images"] = [len(mine)]
    return part


@pytest.mark.parametrize("per", ["image", "request"])
@pytest.mark.parametrize(("family", "kind"), CASES)
@torch.no_grad()
def test_batch_of_two_equals_each_alone(family, kind, per):
    small, large = SIZES[family]
    prompts = [[4, small, 6], [2, large, 3, small, 9]]
    if kind == "video":
        prompts = [[3, Video(), 7], [5, Video(), 2]]
    model, both = make_inputs(family, prompts)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    pruned = prune_inputs(model, both, keep_ratio=0.4, per=per)
    out = model.generate(**pruned, **settings)
    keep_indices = iter(pruned.keep_indices)
    for i in range(2):
        one = prune_inputs(model, alone(family, both, prompts, i), keep_ratio=0.4, per=per)
        single = model.generate(**one, **settings)
        for mine in one.keep_indices:
            assert torch.equal(mine, next(keep_indices))
        assert torch.equal(out.sequences[i, -6:], single.sequences[0, -6:])
        for a, b in zip(out.logits, single.logits, strict=True):
            torch.testing.assert_close(a[i], b[0], atol=2e-4, rtol=2e-4)  # masked and unmasked attention round apart
    assert next(keep_indices, None) is None


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_placeholders_mask_and_positions(family, kind):
    small, large = SIZES[family]
    prompts = [[4, small, 6], [2, large, 9]] if kind == "image" else [[3, Video(), 7], [2, Video(), 9, Video(), 1]]
    model, inputs = make_inputs(family, prompts)
    pruned = prune_inputs(model, inputs, 5)
    token = IMAGE if kind == "image" else VIDEO
    ids, mask, positions = pruned["input_ids"], pruned["attention_mask"], pruned["position_ids"]
    counts = [sum(not isinstance(p, int) for p in parts) for parts in prompts]
    assert (ids == token).sum(1).tolist() == [5 * c for c in counts] == pruned.stats.visual_after
    assert mask.sum(1).tolist() == pruned.stats.prompt_after
    rows = inputs["input_ids"]
    for i in range(2):
        text = rows[i][(rows[i] != token) & inputs["attention_mask"][i].bool()]
        kept = ids[i][mask[i].bool()]
        assert torch.equal(kept[kept != token], text)  # no text is lost or moved
        pad = len(mask[i]) - int(mask[i].sum())
        assert mask[i].tolist() == [0] * pad + [1] * (len(mask[i]) - pad)
        assert (ids[i, :pad] == PAD).all()
        count = pruned.stats.prompt_after[i]
        text_row = positions[0, i] if positions.ndim == 3 else positions[i]
        assert text_row[pad:].tolist() == list(range(count))
        if family.startswith("qwen"):
            assert positions.shape[0] == 4
            assert int(positions[1:, i].max()) < pruned.stats.prompt_before[i]
            assert int(positions[1:, i, -1].max()) + 1 == count + int(model.model.rope_deltas[i])
    assert pruned.stats.prompt_before == inputs["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_kept_features_are_bit_identical(family, kind):
    model, inputs = make_inputs(family, [prompt(family, kind)])
    pruned = prune_inputs(model, inputs, 6)
    (pooled, deep), *_ = features(model, inputs)
    output = pruned["mm_encoder_outputs"][kind]
    whole = torch.cat(list(pooled))
    keep = pruned.keep_indices[0]
    assert keep.tolist() == sorted(set(keep.tolist()))
    assert len(keep) == 6
    assert torch.equal(torch.cat(list(output.pooler_output)), whole[keep])
    if deep is not None:
        assert len(output.deepstack_features) == 2
        for mine, theirs in zip(output.deepstack_features, deep, strict=True):
            assert torch.equal(torch.cat(list(mine)), torch.cat(list(theirs))[keep])


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_bfloat16(family):
    model, inputs = make_inputs(family, [prompt(family)], dtype=torch.bfloat16)
    pruned = prune_inputs(model, inputs, ALL)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**pruned, max_new_tokens=4, do_sample=False), expected)
    pruned = prune_inputs(model, inputs, 8)
    output = pruned["mm_encoder_outputs"]["image"]
    assert output.pooler_output[0].dtype == torch.bfloat16
    assert model.generate(**pruned, max_new_tokens=4).shape[1] == pruned["input_ids"].shape[1] + 4


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_beam_search_on_a_ragged_batch_equals_each_prompt_alone(family, kind):
    """Beams repeat the features of each prompt; features of prompts of unequal length must not be mixed up."""
    small, large = SIZES[family]
    prompts = [[4, small, 6], [2, large, 9]] if kind == "image" else [[3, Video(), 7], [5, Video(), 2]]
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    model, both = make_inputs(family, prompts, seed=1)
    pruned = prune_inputs(model, both, keep_ratio=0.3)
    out = model.generate(**pruned, **settings)
    assert torch.equal(model.generate(**pruned, **settings), out)  # one result serves many calls
    for i in range(2):
        one = prune_inputs(model, alone(family, both, prompts, i), keep_ratio=0.3)
        assert torch.equal(model.generate(**one, **settings)[0, -4:], out[i, -4:])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_images_and_videos_in_one_prompt(family):
    image = SIZES[family][0]
    model, inputs = make_inputs(family, [[2, Video(), 3, image, 4]])
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    out = model.generate(**prune_inputs(model, inputs, ALL), max_new_tokens=5, do_sample=False)
    assert torch.equal(out, expected)
    pruned = prune_inputs(model, inputs, 5)
    ids = pruned["input_ids"]
    assert [int((ids == t).sum()) for t in (IMAGE, VIDEO)] == [5, 5]
    by_request = prune_inputs(model, inputs, 9, per="request")
    assert sum(len(k) for k in by_request.keep_indices) == 9
    by_frame = prune_inputs(model, inputs, 2, per="tile")
    assert len(by_frame.keep_indices[1]) == 2 * Video().frames
    assert model.generate(**by_frame, max_new_tokens=2).shape[1] == by_frame["input_ids"].shape[1] + 2


def test_right_padded_prompts_come_back_left_padded():
    small, large = SIZES["llava_next"]
    model, right = make_inputs("llava_next", [[4, small, 6], [2, large, 9]], pad="right")
    _, left = make_inputs("llava_next", [[4, small, 6], [2, large, 9]])
    a, b = prune_inputs(model, right, 6), prune_inputs(model, left, 6)
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(a[key], b[key])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_any_resolution_layout_against_the_packed_features(family):
    """Tiles and newline rows, checked by value: each row must come from the tile it is said to be of."""
    for size in (Image(100, 90), Image(40, 100), Image(100, 30), Image(20, 150), Image(56, 56)):
        model, inputs = make_inputs(family, [[2, size, 3]])
        (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
        newline = (visual.features == model.model.image_newline).all(1)
        assert torch.equal(newline, visual.newline)
        assert newline.any()
        count = int(visual.tile.max()) + 1
        tiles = inputs["pixel_values"][0, :count]
        with torch.no_grad():
            states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
            if family == "llava_next":
                states = model.model.multi_modal_projector(states[-2][:, 1:])
            else:
                states = model.model.multi_modal_projector(states[-1])
        resized = family == "llava_onevision" and count > 4  # interpolated rows equal no tile's row
        for row, (vector, tile) in enumerate(zip(visual.features, visual.tile.tolist(), strict=True)):
            if newline[row] or (resized and tile > 0):
                continue
            assert torch.isclose(states[tile], vector, atol=1e-5).all(1).any(), (size, row, tile)
        # Lines count up through the grid; the base view of a cut image stands in none.
        base = 16 if count > 1 else 0
        assert (visual.line[:base] == -1).all()
        assert torch.equal(visual.line[newline], torch.arange(int(newline.sum())))
        assert visual.line[base] == 0
        assert (visual.line[base:].diff() == newline[base:-1].long()).all()
