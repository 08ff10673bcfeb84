"""Methods by name, callables and calibrations in `prune_inputs` and `script_pruning`; calibration of a whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import SIZES, Image, make_inputs

from script_kernels import methods
from script_kernels.calibrate import Calibration, Candidate, Row
from script_kernels.transformers import prune_inputs, script_pruning
from script_kernels.transformers.encode import encode

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def example(family: str = "llava_next"):
    return make_inputs(family, [[4, SIZES[family][0], 6]])


@pytest.mark.parametrize("method", ["cdpruner", "dpp", "divprune", "gsp", "mmr", "random"])
def test_a_method_s_name_selects_what_the_method_does(method):
    model, inputs = example("llava_next")
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    rows = (~visual.newline).nonzero()[:, 0]
    tokens = visual.features[rows][None]
    query = torch.randn(3, tokens.shape[2], generator=torch.Generator().manual_seed(1))
    relevance = methods.relevance_of(tokens, query[None], reduce="max", negate=True)
    kept = prune_inputs(model, inputs, 9, query=query, method=method, reduce="max", negate=True)
    assert torch.equal(kept.keep_indices[0], rows[methods.select(tokens, relevance, 9, method=method)[0]])
    torch.testing.assert_close(kept.scores[0][rows], relevance[0])


def test_every_unit_of_a_method_gets_its_own_budget():
    model, inputs = make_inputs("qwen2_5_vl", [[2, *SIZES["qwen2_5_vl"], 4], [3, Image(4, 4), 5]])
    pruned = prune_inputs(model, inputs, 6, method="cdpruner", power=2.0)
    assert [len(kept) for kept in pruned.keep_indices] == [6, 6, 4]
    free = prune_inputs(model, inputs, 6, query=None, method="dpp").keep_indices
    visuals, *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    for visual, kept in zip(visuals, free, strict=True):
        assert torch.equal(kept, methods.select(visual.features[None], None, len(kept), method="dpp")[0])


def test_a_callable_selects_and_is_checked():
    model, inputs = example("llava")
    seen = []

    def last(tokens, relevance, keep, *, shift=0):
        seen.append((tuple(tokens.shape), relevance is None))
        return torch.arange(tokens.shape[1] - keep, tokens.shape[1])[None] - shift

    kept = prune_inputs(model, inputs, 5, method=last, shift=1)
    assert kept.keep_indices[0].tolist() == [30, 31, 32, 33, 34]
    prune_inputs(model, inputs, 5, method=last, query=None)
    assert seen == [((1, 36, 64), False), ((1, 36, 64), True)]
    with script_pruning(model, 5, method=last) as run:
        model.generate(**inputs, **GREEDY)
    assert run.keep_indices[0].tolist() == [31, 32, 33, 34, 35]
    with pytest.raises(ValueError, match="distinct"):
        prune_inputs(model, inputs, 5, method=lambda tokens, relevance, keep: torch.zeros(1, keep, dtype=torch.int64))


def test_a_calibration_stands_for_its_best_candidate(tmp_path):
    model, inputs = example("llava")

    def found(candidate):
        return Calibration(7, (Row(candidate, 4, 0.1, 0.1, 1.0),))

    chosen = found(Candidate("cdpruner", {"power": 2.0}, reduce="max", negate=True))
    chosen.save(tmp_path / "found.json")
    by_hand = prune_inputs(model, inputs, 7, method="cdpruner", power=2.0, reduce="max", negate=True).keep_indices[0]
    for given in (chosen, tmp_path / "found.json", str(tmp_path / "found.json")):
        assert torch.equal(prune_inputs(model, inputs, calibration=given).keep_indices[0], by_hand)
    with script_pruning(model, calibration=chosen) as run:
        model.generate(**inputs, **GREEDY)
    assert torch.equal(run.keep_indices[0], by_hand)
    assert len(prune_inputs(model, inputs, 4, calibration=chosen).keep_indices[0]) == 4
    assert len(prune_inputs(model, inputs, keep_ratio=0.25, calibration=chosen).keep_indices[0]) == 9
    free = prune_inputs(model, inputs, calibration=found(Candidate("dpp", query=False)))
    assert torch.equal(free.keep_indices[0], prune_inputs(model, inputs, 7, query=None, method="dpp").keep_indices[0])
    assert (free.scores[0] == 1).all()
    with pytest.raises(ValueError, match="calibration: expected no method, reduce or options"):
        prune_inputs(model, inputs, calibration=chosen, method="dpp")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "best"}, ValueError, "method: expected a callable or one of"),
        ({"method": 3}, TypeError, "method: expected a name or a callable"),
        ({"reduce": "median"}, ValueError, "reduce: expected 'mean' or 'max'"),
        ({"method": "dpp", "power": 2.0}, TypeError, "options: expected some of negate, ridge, got power"),
    ],
)
def test_bad_methods(arguments, error, message):
    model, inputs = example("llava")
    with pytest.raises(error, match=message):
        prune_inputs(model, inputs, 4, **arguments)
