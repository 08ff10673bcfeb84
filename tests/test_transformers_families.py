"""Models that no family names: the check on their first inputs, `register_family`, refusals, wrappers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_vlm import SIZES, make_inputs

from script_kernels.transformers import Family, layouts, prune_inputs, register_family, script_pruning
from script_kernels.transformers import families as table


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch):
    """A LLaVA that the table does not name."""
    monkeypatch.setattr(table, "FAMILIES", {k: v for k, v in table.FAMILIES.items() if k != "llava"})
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    import copy

    return copy.deepcopy(model), inputs  # one that no check has passed yet


def reversed_rows(model, inputs, ids, run):
    """An adapter with a fault: the rows of an image from last to first."""
    visuals, outputs = layouts.entries(model, inputs, ids, run)
    return [dataclasses.replace(v, features=v.features.flip(0)) for v in visuals], outputs


def test_an_unknown_type_is_checked_and_pruned(unknown):
    model, inputs = unknown
    calls = []
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    assert prune_inputs(model, inputs, 5).stats.visual_after == [5]
    assert len(calls) == 2  # the unpruned side and the one that keeps everything
    prune_inputs(model, inputs, 5)
    assert len(calls) == 2


def test_the_check_sees_a_wrong_adapter(unknown):
    model, inputs = unknown
    register_family("llava", Family("wrong", reversed_rows))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"expected the unpruned logits when everything is kept.*register_family"
        ):
            prune_inputs(model, inputs, 5)
    register_family("llava", Family("right", layouts.entries))
    assert prune_inputs(model, inputs, 5).stats.visual_after == [5]


def test_the_check_inside_a_block_compares_with_the_unpruned_model(unknown):
    model, inputs = unknown
    with script_pruning(model, keep=5) as last:
        model.generate(**inputs, max_new_tokens=2)
        assert last.stats.visual_after == [5]


def test_register_family_refuses_what_is_none():
    with pytest.raises(TypeError, match="model_type: expected a str, got int"):
        register_family(3, Family("x"))
    with pytest.raises(TypeError, match="family: expected a Family, got function"):
        register_family("x", lambda: None)


def test_text_alone_passes_and_placeholders_without_pixels_do_not():
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    text = {key: inputs[key][:, -5:] for key in ("input_ids", "attention_mask")}
    pruned = prune_inputs(model, text, 4)
    assert dict(pruned.items()) == text
    assert (pruned.keep_indices, pruned.stats.prompt_after) == ([], [5])
    both = prune_inputs(model, inputs | {"use_cache": True}, 4)
    assert both["use_cache"] is True


def test_a_row_of_text_in_a_batch_is_answered_as_alone():
    small = SIZES["llava"][0]
    model, both = make_inputs("llava", [[4, small, 6], [9]])
    out = model.generate(**prune_inputs(model, both, 5), max_new_tokens=4, do_sample=False)
    valid = both["attention_mask"][1].bool()
    text = {key: both[key][1:, valid] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, max_new_tokens=4, do_sample=False)[0, -4:], out[1, -4:])


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_share_the_model(wrap):
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    expected = prune_inputs(model, inputs, 5)
    assert torch.equal(prune_inputs(wrap(model), inputs, 5).keep_indices[0], expected.keep_indices[0])


def test_peft_and_offloaded_models(unknown):
    model, inputs = unknown
    expected = prune_inputs(model, inputs, 5)
    answer = model.generate(**expected, max_new_tokens=4, do_sample=False)
    peft = pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    import copy

    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(prune_inputs(adapted, inputs, 5).keep_indices[0], expected.keep_indices[0])
    with script_pruning(adapted, keep=5) as last:
        adapted.generate(**inputs, max_new_tokens=2)
        assert last.stats.visual_after == [5]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    pruned = prune_inputs(model, inputs, 5)
    assert torch.equal(pruned.keep_indices[0], expected.keep_indices[0])
    assert torch.equal(model.generate(**pruned, max_new_tokens=4, do_sample=False), answer)
