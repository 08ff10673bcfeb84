"""`script_pruning` over turns, chunks, threads, tasks, copies and orders of leaving."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import types

import pytest
import torch
from test_transformers_models import alone
from tiny_vlm import (
    IMAGE,
    IMAGE_FAMILIES,
    PAD,
    SIZES,
    VIDEO,
    VIDEO_FAMILIES,
    VISION_END,
    VISION_START,
    Video,
    make_inputs,
    make_model,
    transformers,
)

from script_kernels.transformers import prune_inputs, script_pruning

# Random models would also say placeholders and padding, which no real one does.
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [PAD, IMAGE, VIDEO, VISION_START, VISION_END]}
CASES = [(family, "image") for family in IMAGE_FAMILIES] + [(family, "video") for family in VIDEO_FAMILIES]


def example(family: str = "llava", kind: str = "image"):
    return make_inputs(family, [[4, SIZES[family][0], 6] if kind == "image" else [3, Video(), 7]])


def words(rows: int, count: int) -> torch.Tensor:
    return torch.randint(10, 180, (rows, count), generator=torch.Generator().manual_seed(3))


def in_one_prefill(model, pruned, rest: torch.Tensor) -> torch.Tensor:
    """Greedy tokens after the pruned prompt and `rest`, without any cache of an earlier call."""
    positions = pruned["position_ids"]
    steps = torch.arange(1, rest.shape[1] + 1)
    whole = dict(pruned.items()) | {
        "input_ids": torch.cat([pruned["input_ids"], rest], 1),
        "attention_mask": torch.cat([pruned["attention_mask"], torch.ones_like(rest)], 1),
        "position_ids": torch.cat([positions, positions[..., -1:] + steps], -1),
    }
    return model.generate(**whole, **GREEDY)[:, -5:]


# --- turns


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_second_turn_passes_the_whole_conversation(family, kind, positions):
    model, inputs = example(family, kind)
    length = inputs["input_ids"].shape[1]
    settings = {"keep": 7, "positions": positions}
    with script_pruning(model, **settings):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        second_ids = torch.cat([first.sequences, words(1, 4)], 1)
        model.generate(**inputs, **GREEDY)  # another conversation between the two leaves no trace
        second = model.generate(
            input_ids=second_ids, past_key_values=first.past_key_values, **GREEDY, return_dict_in_generate=True
        )
        assert torch.equal(second.sequences[:, : second_ids.shape[1]], second_ids)
        third_ids = torch.cat([second.sequences, words(1, 3)], 1)
        third = model.generate(input_ids=third_ids, past_key_values=second.past_key_values, **GREEDY)
    pruned = prune_inputs(model, inputs, **settings)
    assert torch.equal(second.sequences[:, -5:], in_one_prefill(model, pruned, second_ids[:, length:]))
    pruned = prune_inputs(model, inputs, **settings)
    assert torch.equal(third[:, -5:], in_one_prefill(model, pruned, third_ids[:, length:]))
    whole = dict(inputs) | {"input_ids": second_ids, "attention_mask": torch.ones_like(second_ids)}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 9))
    # The unpruned answer is another, so that the comparison can tell.
    assert not torch.equal(second.sequences[:, -5:], model.generate(**whole, **GREEDY)[:, -5:])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_second_turn_of_a_ragged_batch_equals_each_alone(family):
    small, large = SIZES[family]
    prompts = [[4, small, 6], [2, large, 3, small, 9]]
    model, both = make_inputs(family, prompts)
    rest = words(2, 4)

    def two_turns(inputs, rest):
        with script_pruning(model, keep=5):
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, rest], 1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            return model.generate(**turn, **GREEDY)[:, -5:]

    together = two_turns(both, rest)
    for i in range(2):
        assert torch.equal(two_turns(alone(family, both, prompts, i), rest[i : i + 1])[0], together[i])


def test_a_conversation_of_another_prompt_is_refused():
    model, inputs = example()
    with script_pruning(model, keep=7):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        other = first.sequences.clone()
        other[0, 1] += 1
        for ids in (other, first.sequences[:, -5:]):
            with pytest.raises(ValueError, match="input_ids: expected the conversation from its start"):
                model.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)
        kept = copy.deepcopy(first.past_key_values)
        again = torch.cat([first.sequences, words(1, 4)], 1)
        a = model.generate(input_ids=again, past_key_values=kept, **GREEDY)
        assert torch.equal(model.generate(input_ids=again, past_key_values=first.past_key_values, **GREEDY), a)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_cache_of_a_pruned_prompt_is_refused_outside_the_block(family):
    model, inputs = example(family)
    with script_pruning(model, keep=7):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, transformers.DynamicCache)
    ids = torch.cat([first.sequences, words(1, 4)], 1)
    before = first.past_key_values.get_seq_length()
    for cache in (first.past_key_values, copy.deepcopy(first.past_key_values)):
        with pytest.raises(ValueError, match="past_key_values: expected a call inside script_pruning"):
            model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        with pytest.raises(ValueError, match="past_key_values: expected a call inside script_pruning"):
            model(input_ids=ids[:, -1:], past_key_values=cache)
        assert cache.get_seq_length() == before
    with script_pruning(model, keep=3):  # another block serves it: the cache knows its own prompt
        out = model.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)
    pruned = prune_inputs(model, inputs, 7)
    assert torch.equal(out[:, -5:], in_one_prefill(model, pruned, ids[:, inputs["input_ids"].shape[1] :]))


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_a_loop_over_the_model_may_count_the_unpruned_prompt(family, positions):
    model, inputs = example(family)
    plain = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**prune_inputs(model, inputs, 7, positions=positions), **plain)[0, -5:].tolist()
    with script_pruning(model, keep=7, positions=positions):
        for masked in (True, False):
            mask = inputs["attention_mask"]
            out = model(**inputs, use_cache=True)
            tokens = [int(out.logits[0, -1].argmax())]
            while len(tokens) < 5:
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                extra = {"attention_mask": mask} if masked else {}
                step = torch.tensor([tokens[-1:]])
                out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True, **extra)
                tokens.append(int(out.logits[0, -1].argmax()))
            assert tokens == expected


# --- chunked prefill


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_chunked_prefill_equals_a_whole_one_or_is_refused(family, kind, positions):
    model, inputs = example(family, kind)
    settings = {"keep": 7, "positions": positions}
    expected = model.generate(**prune_inputs(model, inputs, **settings), **GREEDY)
    chunked = GREEDY | {"prefill_chunk_size": 8, "use_cache": True}
    from transformers.generation import utils

    if hasattr(utils, "_slice_mm_encoder_output"):
        out = model.generate(**prune_inputs(model, inputs, **settings), **chunked)
        assert torch.equal(out, expected)
        with script_pruning(model, **settings):
            assert torch.equal(model.generate(**inputs, **chunked)[:, -5:], expected[:, -5:])
    else:
        with pytest.raises(TypeError, match="multiple values for keyword argument 'prefill_chunk_size'"):
            model.generate(**prune_inputs(model, inputs, **settings), **chunked)
        with script_pruning(model, **settings), pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs, **chunked)


# --- contexts


def is_original(model) -> bool:
    return not {"generate", "forward", "generate_batch"} & set(model.__dict__)


def test_other_threads_are_untouched_and_copies_of_the_context_are_pruned():
    model, inputs = example()
    unpruned = model.generate(**inputs, **GREEDY)
    found = {}

    def call(name):
        found[name] = model.generate(**inputs, **GREEDY)

    with script_pruning(model, keep=7):
        pruned = model.generate(**inputs, **GREEDY)
        threads = [
            threading.Thread(target=call, args=("plain",)),
            threading.Thread(target=contextvars.copy_context().run, args=(call, "copied")),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert not torch.equal(pruned, unpruned)
    assert torch.equal(found["plain"], unpruned)
    assert torch.equal(found["copied"], pruned)
    assert is_original(model)


def test_threads_prune_side_by_side_each_in_its_own_way():
    model, inputs = example()
    keeps = [3, 7, 12, None]
    expected = {}
    for keep in keeps:
        given = prune_inputs(model, inputs, keep) if keep else inputs
        expected[keep] = model.generate(**given, **GREEDY)[:, -5:]
    wrong, barrier = [], threading.Barrier(len(keeps))

    def work(keep):
        barrier.wait()
        for _ in range(5):
            if keep is None:
                out = model.generate(**inputs, **GREEDY)
            else:
                with script_pruning(model, keep=keep) as last:
                    out = model.generate(**inputs, **GREEDY)
                    if last.stats.visual_after != [keep]:
                        wrong.append((keep, last.stats.visual_after))
            if not torch.equal(out[:, -5:], expected[keep]):
                wrong.append(keep)

    threads = [threading.Thread(target=work, args=(keep,)) for keep in keeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert is_original(model)


def test_tasks_prune_each_in_their_own_way():
    model, inputs = example()
    unpruned = model.generate(**inputs, **GREEDY)
    seen = {}

    async def prunes(keep):
        with script_pruning(model, keep=keep) as last:
            await asyncio.sleep(0)
            model.generate(**inputs, **GREEDY)
            await asyncio.sleep(0.01 * (10 - keep))  # they leave in another order than they came
            model.generate(**inputs, **GREEDY)
            seen[keep] = last.stats.visual_after

    async def plain():
        await asyncio.sleep(0)
        seen[None] = model.generate(**inputs, **GREEDY)

    async def late(inside):
        await inside.wait()
        return model.generate(**inputs, **GREEDY)

    async def everything():
        await asyncio.gather(prunes(3), plain(), prunes(7), prunes(5))
        left = asyncio.Event()
        with script_pruning(model, keep=4):
            task = asyncio.create_task(late(left))  # started inside, but the block is left when it goes on
            await asyncio.sleep(0)
        left.set()
        return await task

    after = asyncio.run(everything())
    assert {keep: seen[keep] for keep in (3, 5, 7)} == {3: [3], 5: [5], 7: [7]}
    assert torch.equal(seen[None], unpruned)
    assert torch.equal(after, unpruned)
    assert is_original(model)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_any_order_of_leaving_restores_the_model(family):
    model, inputs = example(family)
    unpruned = model.generate(**inputs, **GREEDY)
    a, b = script_pruning(model, keep=7), script_pruning(model, keep=3)
    in_a = a.__enter__()
    in_b = b.__enter__()
    model.generate(**inputs, **GREEDY)
    assert (in_a.stats, in_b.stats.visual_after) == (None, [3])
    a.__exit__(None, None, None)
    model.generate(**inputs, **GREEDY)
    assert in_a.stats is None
    b.__exit__(None, None, None)
    assert is_original(model)
    assert torch.equal(model.generate(**inputs, **GREEDY), unpruned)


def test_a_copy_made_inside_is_not_pruned():
    model, inputs = example()
    unpruned = model.generate(**inputs, **GREEDY)
    with script_pruning(model, keep=7) as last:
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**inputs, **GREEDY), unpruned)
        assert twin(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        assert last.stats is None
    assert twin.generate.__self__ is twin
    assert torch.equal(twin.generate(**inputs, **GREEDY), unpruned)
    with script_pruning(twin, keep=7) as last:
        twin.generate(**inputs, **GREEDY)
        assert last.stats.visual_after == [7]
    assert torch.equal(twin.generate(**inputs, **GREEDY), unpruned)


def test_a_wrapper_put_on_inside_stays_and_prunes_no_more():
    model, inputs = example()
    calls = []
    try:
        with script_pruning(model, keep=7):
            inner = model.generate
            model.generate = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
        assert torch.equal(model.generate(**inputs, **GREEDY), type(model).generate(model, **inputs, **GREEDY))
        assert calls == [1]
    finally:
        del model.generate


def test_continuous_batching_is_refused_by_name():
    model = make_model("llava")
    with script_pruning(model, keep=7):
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(type(model), name):
                with pytest.raises(ValueError, match=f"{name}: expected generate or prune_inputs"):
                    getattr(model, name)([[1, 2, 3]])


def test_transformers_serve_prunes_where_the_block_is_open_in_its_thread():
    """It generates in a thread of its own: a block around it is not that thread's, one that is opened there is."""
    serving = pytest.importorskip("transformers.cli.serving.utils")
    if not hasattr(serving, "GenerateManager"):
        pytest.skip("this version serves in another way")
    model, inputs = example()
    lengths = []

    def look(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            lengths.append(kwargs["inputs_embeds"].shape[1])

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    processor = types.SimpleNamespace(decode=lambda ids, **_: ids.tolist())
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    first = {name: value[:1] for name, value in inputs.items()}
    manager = serving.GenerateManager()

    def answer():
        return asyncio.run(manager.generate_non_streaming(model, processor, first, config, "request"))

    try:
        unpruned = answer()
        with script_pruning(model, keep=7):
            assert answer()[0] == unpruned[0]
        block = script_pruning(model, keep=7)
        manager.submit(block.__enter__).result()
        pruned = answer()
        manager.submit(block.__exit__, None, None, None).result()
        after = answer()
    finally:
        hook.remove()
        manager.stop()
    whole, short = first["input_ids"].shape[1], int((first["input_ids"][0] != IMAGE).sum()) + 7
    assert lengths == [whole, whole, short, whole]
    assert pruned[1] == whole  # the prompt comes back as it was passed
    assert len(pruned[0]) == 3
    assert after[0] == unpruned[0]
    assert "generate" not in model.__dict__
