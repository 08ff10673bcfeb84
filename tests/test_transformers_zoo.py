"""Every type of model that is claimed: pruned inputs against the unpruned model, on tiny random models."""

from __future__ import annotations

import copy

import pytest
import torch
import vlm_zoo
from vlm_zoo import IMAGE, make_inputs, make_model

from script_kernels.transformers import prune_inputs

KEEP = 3


def pooled_rows(output) -> torch.Tensor:
    pooled = output.pooler_output
    parts = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@pytest.mark.parametrize("kind", vlm_zoo.PROVEN)
@torch.no_grad()
def test_a_type_is_pruned_right(kind):
    if kind not in vlm_zoo.TYPES:
        pytest.skip(f"this version of transformers has no {kind}")
    model = make_model(kind)
    inputs = make_inputs(model, kind)
    expected = model(**inputs).logits
    whole = prune_inputs(model, inputs, 10**6)
    torch.testing.assert_close(model(**whole).logits, expected, atol=1e-5, rtol=1e-5)

    pruned = prune_inputs(model, inputs, KEEP)
    assert pruned.stats.visual_after == [KEEP] < pruned.stats.visual_before
    assert int((pruned["input_ids"] == IMAGE).sum()) == KEEP
    mine = model(**pruned).logits
    assert torch.isfinite(mine).all()
    assert float((mine[0, -1] - expected[0, -1]).abs().max()) > 1e-3
    rows = pooled_rows(vlm_zoo.features(model, inputs))
    keep = pruned.keep_indices[0]
    assert torch.equal(pooled_rows(pruned["mm_encoder_outputs"]["image"]), rows[keep])

    # A wrong selection must be seen: other rows in the same places give other logits.
    others = [i for i in range(len(rows)) if i not in keep.tolist()]
    wrong = dict(pruned.items())
    output = copy.copy(wrong["mm_encoder_outputs"]["image"])
    swapped = rows[keep].clone()
    swapped[0] = rows[others[0]]
    theirs = output.pooler_output
    output.pooler_output = swapped.reshape(theirs.shape) if isinstance(theirs, torch.Tensor) else [swapped]
    wrong["mm_encoder_outputs"] = {"image": output}
    assert float((model(**wrong).logits - mine).abs().max()) > 1e-3

    out = model.generate(**pruned, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == pruned["input_ids"].shape[1] + 3

    both = make_inputs(model, kind, 2)
    together = prune_inputs(model, both, KEEP)
    logits = model(**together).logits[:, -1]
    for i in range(2):
        one = prune_inputs(model, vlm_zoo.alone(both, i), KEEP)
        assert torch.equal(one.keep_indices[0], together.keep_indices[i])
        torch.testing.assert_close(model(**one).logits[0, -1], logits[i], atol=2e-4, rtol=2e-4)
