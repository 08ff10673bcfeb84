"""The rest of the transformers interface: budgets, queries, the context manager, errors, counts."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_vlm import (
    EOS,
    IMAGE,
    IMAGE_FAMILIES,
    SIZES,
    VIDEO,
    VISION_END,
    VISION_START,
    Image,
    make_inputs,
    make_model,
    transformers,
)
from torch.utils.flop_counter import FlopCounterMode

import script_kernels
from script_kernels import methods
from script_kernels.transformers import kv_cache_bytes, prefill_flops, prune_inputs, script_pruning
from script_kernels.transformers.encode import encode
from script_kernels.transformers.query import user_columns
from script_kernels.transformers.versions import splits_chunks

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def example(family: str = "llava_next"):
    return make_inputs(family, [[4, SIZES[family][0], 6]])


# --- budgets


def test_keep_ratio_is_rounded_up_and_min_tokens_is_a_floor():
    model, inputs = example("llava")  # 36 tokens
    assert len(prune_inputs(model, inputs, keep_ratio=0.11).keep_indices[0]) == 4
    assert len(prune_inputs(model, inputs, keep_ratio=0.25).keep_indices[0]) == 9
    assert len(prune_inputs(model, inputs, keep_ratio=0.01, min_tokens=5).keep_indices[0]) == 5
    assert len(prune_inputs(model, inputs, 37).keep_indices[0]) == 36


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl"])
def test_per_tile_keeps_that_many_of_each_tile(family):
    model, inputs = example(family)
    pruned = prune_inputs(model, inputs, 3, per="tile")
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    tiles = int(visual.tile.max()) + 1
    assert tiles > 1
    assert visual.tile[pruned.keep_indices[0]].bincount().tolist() == [3] * tiles


def test_per_request_shares_one_budget():
    model, inputs = make_inputs("qwen2_5_vl", [[2, *SIZES["qwen2_5_vl"], 4], [3, Image(4, 4), 5]])
    pruned = prune_inputs(model, inputs, 10, per="request")
    first, second, third = map(len, pruned.keep_indices)
    assert first + second == 10
    assert third == 4
    assert pruned.stats.visual_after == [10, 4]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newline_rows(family):
    model, inputs = example(family)
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    dropped = prune_inputs(model, inputs, 9).keep_indices[0]
    assert len(dropped) == 9
    assert not visual.newline[dropped].any()
    kept = prune_inputs(model, inputs, 9, newlines="lines").keep_indices[0]
    content = kept[~visual.newline[kept]]
    assert torch.equal(content, dropped)
    lines = visual.line[content]
    expected = sorted(set(lines[lines >= 0].tolist()))
    assert visual.line[kept[visual.newline[kept]]].tolist() == expected != []
    scores = prune_inputs(model, inputs, 9).scores[0]
    assert torch.equal(scores.isnan(), visual.newline)
    whole = prune_inputs(model, inputs, len(visual.features))
    assert len(whole.keep_indices[0]) == len(visual.features)


def test_pruning_options_reach_the_op():
    model, inputs = example("llava")
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    query = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    options = {
        "negate": True,
        "gsp_drop": 0.4,
        "oversample": 1.5,
        "combine": "restrict",
        "threshold": 0.1,
        "min_degree": 2,
    }
    pruned = prune_inputs(model, inputs, 8, query=query, reduce="mean", floor=0.5, **options)
    expected = script_kernels.prune(visual.features[None], query[None], 8, floor=0.5, **options)[0]
    assert torch.equal(pruned.keep_indices[0], expected)
    assert not torch.equal(prune_inputs(model, inputs, 8, query=query).keep_indices[0], expected)


GRAPH = {"combine": "restrict", "survivors": 2.0}
FOCUS = {"method": "focus"}


@pytest.mark.parametrize(
    ("given", "open_ones"),
    [
        ({}, {**FOCUS, "floor": 0.3, "survivors": 2.0, "reduce": "max"}),
        ({"reduce": "mean"}, {**FOCUS, "floor": 0.3}),
        ({"floor": 0.0}, {**FOCUS, "reduce": "max"}),
        ({"method": "script"}, {"floor": 0.3, **GRAPH, "reduce": "max"}),
        ({"method": "script", "reduce": "mean"}, {"floor": 0.3, **GRAPH}),
        ({"method": "script", "floor": 0.0}, {**GRAPH, "reduce": "max"}),
        ({"mix": 0.5}, {**GRAPH, "reduce": "max"}),
        ({"power": 2.0}, {**GRAPH, "reduce": "max"}),
        ({"gsp_drop": 0.5}, {"floor": 0.3, "reduce": "max"}),
        ({"combine": "union"}, {"floor": 0.3, "reduce": "max"}),
        ({"negate": True}, {**FOCUS, "reduce": "max"}),
        ({"method": "script", "negate": True}, {"floor": 0.3, **GRAPH, "reduce": "max"}),
        ({"method": "cdpruner"}, {"reduce": "mean"}),
        ({"query": None}, {}),
    ],
)
def test_what_is_left_open_is_settled(given, open_ones):
    model, inputs = example("llava")
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    tokens = visual.features[None]
    query = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    kept = prune_inputs(model, inputs, 8, **{"query": query, **given}).keep_indices[0]
    how = {**open_ones, **given}
    relevance = None
    if how.pop("query", query) is not None:
        negate = how.pop("negate", False)
        relevance = methods.relevance_of(tokens, query[None], reduce=how.pop("reduce", "mean"), negate=negate)
        if how.get("method") == "focus":
            how |= {
                "grids": [(6, 6)],
                "above": methods.relevance_of(tokens, query[None], reduce="above", negate=negate),
            }
    assert torch.equal(kept, methods.select(tokens, relevance, 8, **how)[0])


@pytest.mark.parametrize("other", [{"reduce": "mean"}, {"floor": 0.0}, {"gsp_drop": 0.25}])
def test_each_part_of_what_is_settled_counts(other):
    model, inputs = example("llava")
    differ = 0
    for seed in range(8):
        query = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
        kept, without = (prune_inputs(model, inputs, 8, query=query, **given).keep_indices[0] for given in ({}, other))
        differ += not torch.equal(kept, without)
    assert differ


# --- queries


def test_queries():
    model, inputs = example("llava")
    ids = inputs["input_ids"][0]
    words = model.get_input_embeddings()(ids[-6:])
    text = prune_inputs(model, inputs, 6, query="text")
    own = prune_inputs(model, inputs, 6, query=words.detach())
    assert torch.equal(text.scores[0], own.scores[0])
    assert torch.equal(text.keep_indices[0], own.keep_indices[0])
    mean = prune_inputs(model, inputs, 6, query="text_mean")
    assert torch.equal(mean.scores[0], prune_inputs(model, inputs, 6, query=words.detach().mean(0)).scores[0])
    assert not torch.equal(mean.scores[0], text.scores[0])
    assert float(text.scores[0].min()) == 0
    assert float(text.scores[0].max()) == 1
    assert (prune_inputs(model, inputs, 6, query=None).scores[0] == 1).all()


def test_a_query_of_three_dimensions_goes_prompt_by_prompt():
    model, inputs = make_inputs("llava", [[4, Image(), 6], [2, Image(), 9]])
    query = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    both = prune_inputs(model, inputs, 6, query=query)
    swapped = prune_inputs(model, inputs, 6, query=query.flip(0))
    first = prune_inputs(model, inputs, 6, query=query[0])
    assert torch.equal(both.keep_indices[0], first.keep_indices[0])
    assert torch.equal(swapped.keep_indices[1], first.keep_indices[1])
    assert not torch.equal(both.scores[1], first.scores[1])


def test_user_columns_without_a_tokenizer():
    model = make_model("qwen2_5_vl")
    model.generation_config.eos_token_id = EOS
    try:
        visual = {IMAGE, VIDEO}
        image = [VISION_START, IMAGE, IMAGE, VISION_END]
        # image first: the words up to the end of the turn, without the header and generation prompt of other turns
        ids = [20, 21, *image, 30, 31, 32, EOS, 40, 41]
        assert [ids[i] for i in user_columns(ids, visual, model)] == [30, 31, 32]
        # words first: what stands before the image in the same turn
        ids = [20, EOS, 30, 31, *image, EOS, 40]
        assert [ids[i] for i in user_columns(ids, visual, model)] == [30, 31]
        # two images: the words after the last
        ids = [25, *image, 30, *image, 33, EOS]
        assert [ids[i] for i in user_columns(ids, visual, model)] == [33]
        # InternVL's marks are not named by its config
        ids = [25, *image, 33, 34]
        assert [ids[i] for i in user_columns(ids, visual, make_model("internvl"))] == [33, 34]
    finally:
        model.generation_config.eos_token_id = None


CHATML = (  # as Qwen's: a default system message, and an ordinary token after each end of turn
    "<|im_start|> system : red and red <|im_end|> nl "
    "{% for m in messages %}<|im_start|> {{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>{% endif %} {% endfor %}<|im_end|> nl "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant :{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER' if m['role'] == 'user' else 'ASSISTANT' }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>{% endif %} {% endfor %}"
    "{% if m['role'] != 'user' %}<|im_end|> {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)
VOCABULARY = (
    "<unk> <|im_start|> <|im_end|> <image> user assistant system : nl USER ASSISTANT what colour is it ? red and"
)


def tokenizer(template: str):
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: 10 + i for i, w in enumerate(VOCABULARY.split())}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        chat_template=template,
    )


@pytest.mark.parametrize("template", [CHATML, VICUNA], ids=["chatml", "vicuna"])
@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize("turns", [1, 2])
def test_user_columns_with_a_chat_template(template, image_first, turns):
    words = tokenizer(template)
    model = make_model("llava")
    model.generation_config.eos_token_id = words.eos_token_id
    try:
        text = {"type": "text", "text": "what colour is it ?"}
        content = [{"type": "image"}, text] if image_first else [text, {"type": "image"}]
        chat = [{"role": "user", "content": content}]
        expected = "what colour is it ?"
        if turns == 2:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": "red and red"}]})
            chat.append({"role": "user", "content": [{"type": "text", "text": "and what is it ?"}]})
            expected = "and what is it ?"
        rendered = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = words(rendered)["input_ids"]
        visual = {words.convert_tokens_to_ids("<image>")}
        found = user_columns(ids, visual, model, words)
        assert words.decode([ids[i] for i in found]) == expected
    finally:
        model.generation_config.eos_token_id = None


# --- the context manager


def snapshot(model) -> dict:
    return dict(model.__dict__.items()) | {"rope": getattr(model.model, "rope_deltas", None)}


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_script_pruning_generates_what_prune_inputs_does_and_leaves_no_trace(family):
    model, inputs = example(family)
    before = model.generate(**inputs, **GREEDY)
    trace = snapshot(model)
    expected = model.generate(**prune_inputs(model, inputs, 7), **GREEDY)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = trace["rope"]
    with script_pruning(model, keep=7) as last:
        assert last.stats is None
        out = model.generate(**inputs, **GREEDY)
        logits = model(**inputs).logits
        assert last.stats.visual_after == [7]
        assert len(last.keep_indices[0]) == 7
        assert len(last.scores) == 1
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    assert torch.equal(out[:, length:], expected[:, -5:])
    assert not torch.equal(out, before)  # the pruned answer differs, so that the test can tell
    assert logits.shape[1] == last.stats.prompt_after[0]
    after = snapshot(model)
    assert after.keys() == trace.keys()
    assert all(after[key] is trace[key] for key in trace)
    assert model.generate.__func__ is type(model).generate
    assert model.forward.__func__ is type(model).forward
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


def test_script_pruning_unpatches_after_an_error_and_restores_another_patch():
    model, inputs = example("llava")
    original = model.forward
    model.forward = patched = lambda *args, **kwargs: original(*args, **kwargs)
    patched.__signature__ = inspect.signature(original)
    try:
        with pytest.raises(ValueError, match="keep: expected at least 1"), script_pruning(model, keep=0):
            model.generate(**inputs)
        assert model.forward is patched
        assert "generate" not in model.__dict__
    finally:
        del model.forward


def test_script_pruning_lets_text_pass_and_nests():
    model, inputs = example("llava")
    text = {key: inputs[key][:, -5:] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**text, **GREEDY)
    with script_pruning(model, keep=7):
        assert torch.equal(model.generate(**text, **GREEDY), expected)
        assert torch.equal(model.generate(text["input_ids"], **GREEDY), expected)
        with script_pruning(model, keep=3) as inner:
            model.generate(**inputs, **GREEDY)
            assert inner.stats.visual_after == [3]
        with script_pruning(model, keep=5) as inner:
            model.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"], **GREEDY)
            assert inner.stats.visual_after == [5]


def test_script_pruning_counts_lengths_from_the_prompt_as_passed():
    model, inputs = example("llava")
    length = inputs["input_ids"].shape[1]
    with script_pruning(model, keep=7):
        assert model.generate(**inputs, max_length=length + 4, do_sample=False).shape[1] == length + 4
        out = model.generate(
            **inputs, max_new_tokens=3, num_beams=4, num_return_sequences=2, return_dict_in_generate=True
        )
        assert out.sequences.shape == (2, length + 3)
        assert torch.equal(out["sequences"][:, :length], inputs["input_ids"].expand(2, -1))


def test_script_pruning_refuses_what_it_cannot_do():
    model, inputs = example("llava")
    with script_pruning(model, keep=7):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="past_key_values: expected none"):
            model.generate(**inputs, past_key_values=out.past_key_values, **GREEDY)
        with pytest.raises(ValueError, match="position_ids: expected None"):
            model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
    with (
        script_pruning(model, keep=7, positions="original"),
        pytest.raises(ValueError, match="use_cache: expected True"),
    ):
        model.generate(**inputs, use_cache=False, **GREEDY)


def test_labels_follow_their_tokens():
    model, inputs = make_inputs("llava", [[4, Image(), 6], [2, Image(), 9]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    pruned = prune_inputs(model, inputs | {"labels": labels}, 7)
    expected = pruned["input_ids"].masked_fill((pruned["input_ids"] == IMAGE) | (pruned["attention_mask"] == 0), -100)
    assert torch.equal(pruned["labels"], expected)
    assert torch.isfinite(model(**pruned).loss)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "keep, keep_ratio: expected exactly one"),
        ({"keep": 4, "keep_ratio": 0.5}, ValueError, "keep, keep_ratio: expected exactly one"),
        ({"keep": 0}, ValueError, "keep: expected at least 1, got 0"),
        ({"keep": 2.5}, TypeError, "keep: expected an int, got float"),
        ({"keep": True}, TypeError, "keep: expected an int, got bool"),
        ({"keep_ratio": 0.0}, ValueError, r"keep_ratio: expected a number in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, ValueError, "keep_ratio"),
        ({"keep": 4, "per": "frame"}, ValueError, "per: expected one of image, tile, request, got 'frame'"),
        ({"keep": 4, "min_tokens": 0}, ValueError, "min_tokens: expected an int of at least 1"),
        ({"keep": 4, "newlines": "all"}, ValueError, "newlines: expected 'drop' or 'lines'"),
        ({"keep": 4, "positions": "new"}, ValueError, "positions: expected 'original', 'renumber' or None"),
        ({"keep": 4, "query": "words"}, ValueError, "query: expected 'text', 'text_mean'"),
        ({"keep": 4, "query": 3}, TypeError, "query: expected 'text', 'text_mean'"),
        ({"keep": 4, "query": torch.zeros(3, 9)}, ValueError, r"query: expected shape \(64,\), \(Q, 64\)"),
        ({"keep": 4, "query": torch.zeros(5, 3, 64)}, ValueError, "query: expected shape"),
        ({"keep": 4, "temperature": 1.0}, TypeError, "options: expected some of negate, .* got temperature"),
        ({"keep": 4, "combine": "both"}, ValueError, "combine"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model, inputs = example("llava")
    with pytest.raises(error, match=message):
        prune_inputs(model, inputs, **arguments)


def test_bad_inputs():
    model, inputs = example("llava")
    first = torch.where(inputs["input_ids"] == IMAGE)[1][0]
    cut = inputs["input_ids"].index_fill(1, first, 7)
    with pytest.raises(ValueError, match="input_ids: expected 36 image placeholders, one per visual token, got 35"):
        prune_inputs(model, inputs | {"input_ids": cut}, 4)
    with pytest.raises(ValueError, match="inputs: expected pixel_values"):
        prune_inputs(model, {key: inputs[key] for key in ("input_ids", "attention_mask")}, 4)
    with pytest.raises(ValueError, match=r"pixel_values_videos: expected none, as LLaVA-1\.5 takes no video"):
        prune_inputs(model, inputs | {"pixel_values_videos": torch.zeros(1)}, 4)
    with pytest.raises(ValueError, match="got also inputs_embeds"):
        prune_inputs(model, inputs | {"inputs_embeds": torch.zeros(1)}, 4)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape"):
        prune_inputs(model, inputs | {"attention_mask": torch.ones(1, 3)}, 4)
    with pytest.raises(ValueError, match=r"expected input_ids of shape \(B, S\)"):
        prune_inputs(model, inputs | {"input_ids": inputs["input_ids"][0]}, 4)
    lone = make_inputs("llava", [[Image()]])[1]
    with pytest.raises(ValueError, match="query: expected text of the user in every prompt"):
        prune_inputs(model, lone, 4)
    assert len(prune_inputs(model, lone, 4, query=None).keep_indices[0]) == 4


def test_an_image_split_over_two_prompts_is_refused():
    model, inputs = make_inputs("llava", [[4, Image(), 6], [4, Image(), 6]])
    ids = inputs["input_ids"].clone()
    first = (ids[0] == IMAGE).nonzero()[0]
    ids[0, first], ids[1, 0] = 7, IMAGE
    with pytest.raises(ValueError, match="expected each image inside one prompt"):
        prune_inputs(model, inputs | {"input_ids": ids}, 4)


def test_other_models_are_refused_with_the_supported_names():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    model = transformers.LlamaForCausalLM(config)
    for call in (lambda: prune_inputs(model, {}, 4), lambda: script_pruning(model, keep=4).__enter__()):
        with pytest.raises(
            TypeError, match=r"LLaVA-1\.5.*LLaVA-NeXT.*OneVision.*InternVL.*Qwen2\.5-VL.*Qwen3-VL.*'llama'"
        ):
            call()
    with pytest.raises(TypeError, match="got Linear"):
        prune_inputs(torch.nn.Linear(2, 2), {}, 4)


def test_gapped_positions_under_flash_attention_are_refused():
    model, inputs = example("llava")
    text = model.config.get_text_config()
    saved = text._attn_implementation
    text._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ValueError, match="positions: expected 'renumber' with flash_attention_2"):
            prune_inputs(model, inputs, 4, positions="original")
    finally:
        text._attn_implementation = saved


# --- counts


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_prefill_flops_equal_the_counted_ones(family):
    model = make_model(family, attention="eager")
    text, n = model.config.get_text_config(), 37
    embeds = torch.randn(1, n, text.hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, -1:])
    rotary = 2 * n * 8  # the outer product of positions and frequencies, which is no model weight
    counted = counter.get_total_flops()
    assert 0 <= counted - prefill_flops(model.config, n, causal=False) <= 3 * rotary
    assert prefill_flops(model.config, n) < prefill_flops(model.config, n, causal=False)


def test_kv_cache_bytes_equal_the_cache():
    model, inputs = example("llava")
    cache = model(**inputs, use_cache=True).past_key_values
    size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(model.config, inputs["input_ids"].shape[1], torch.float32) == size


def test_stats_count_what_was_pruned():
    model, inputs = make_inputs("llava", [[4, Image(), 6], [2, Image(), 9]])
    stats = prune_inputs(model, inputs, 7).stats
    assert (stats.visual_before, stats.visual_after) == ([36, 36], [7, 7])
    assert [b - a for b, a in zip(stats.prompt_before, stats.prompt_after, strict=True)] == [29, 29]
    assert stats.flops_after == [prefill_flops(model.config, n) for n in stats.prompt_after]
    assert all(b > 1.5 * a for b, a in zip(stats.flops_before, stats.flops_after, strict=True))
    assert stats.vision_ms > 0
    assert stats.prune_ms > 0


def test_outputs_need_no_grad():
    model, inputs = example("llava")
    pruned = prune_inputs(model, inputs, 7)
    assert not pruned["mm_encoder_outputs"]["image"].pooler_output[0].requires_grad
    assert set(pruned) - {"prefill_chunk_size"} == {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs"}
    assert ("prefill_chunk_size" in pruned) is not splits_chunks()
