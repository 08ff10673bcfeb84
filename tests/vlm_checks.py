"""What every type has to do with a picture or a video, given the unpruned model."""

from __future__ import annotations

from typing import Any

import torch
from vlm_zoo import feature_rows, with_rows

from script_kernels.transformers import PrunedInputs, prune_inputs


@torch.no_grad()
def hold_pruning(model: Any, inputs: dict[str, Any], modality: str, rows: torch.Tensor, keep: int) -> PrunedInputs:
    """One prompt with one picture or video, whose features are `rows` (L, D). Returns it pruned to `keep` a unit."""
    expected = model(**inputs).logits
    whole = prune_inputs(model, inputs, 10**6)
    torch.testing.assert_close(model(**whole).logits, expected, atol=1e-5, rtol=1e-5)

    pruned = prune_inputs(model, inputs, keep)
    units = zip(starts(pruned, rows), pruned.keep_indices, strict=True)
    kept = torch.cat([start + indices for start, indices in units])
    assert pruned.stats.visual_after == [len(kept)] < pruned.stats.visual_before == [len(rows)]
    assert inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1] == len(rows) - len(kept)
    mine = model(**pruned).logits
    assert torch.isfinite(mine).all()
    assert float((mine[0, -1] - expected[0, -1]).abs().max()) > 1e-3
    assert torch.equal(feature_rows(pruned["mm_encoder_outputs"][modality]), rows[kept])

    # A wrong selection must be seen: another row in one place gives other logits.
    others = [i for i in range(len(rows)) if i not in kept.tolist()]
    swapped = rows[kept].clone()
    swapped[0] = rows[others[0]]
    wrong = dict(pruned.items())
    wrong["mm_encoder_outputs"] = {modality: with_rows(wrong["mm_encoder_outputs"][modality], swapped)}
    assert float((model(**wrong).logits - mine).abs().max()) > 1e-3

    out = model.generate(**pruned, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == pruned["input_ids"].shape[1] + 3
    return pruned


def starts(pruned: PrunedInputs, rows: torch.Tensor) -> list[int]:
    """Where each unit's rows begin: a video may be several units of one length."""
    units = len(pruned.keep_indices)
    return [len(rows) // units * i for i in range(units)]
