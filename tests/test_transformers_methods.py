"""Methods by name, callables and calibrations in `prune_inputs` and `script_pruning`; calibration of a whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import IMAGE_FAMILIES, SIZES, Image, make_inputs

from script_kernels import methods
from script_kernels.calibrate import Calibration, Candidate, Row
from script_kernels.transformers import calibrate_model, prune_inputs, script_pruning
from script_kernels.transformers.encode import encode
from script_kernels.transformers.grids import _packed
from script_kernels.transformers.layouts import plain
from script_kernels.transformers.select import watched

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


def test_units_of_one_size_are_chosen_together_as_each_alone():
    model, inputs = make_inputs("llava", [[2, *SIZES["llava"], 4]])
    query = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    together = prune_inputs(model, inputs, 6, query=query, method="script").keep_indices
    focused = prune_inputs(model, inputs, 6, query=query).keep_indices
    visuals, *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    assert len(visuals) > 1
    assert len({len(v.features) for v in visuals}) == 1  # so that one call chooses for all
    how = {"floor": 0.3, "combine": "restrict", "survivors": 2.0}
    for visual, kept, by_focus in zip(visuals, together, focused, strict=True):
        tokens = visual.features[None]
        relevance, above = (methods.relevance_of(tokens, query[None], reduce=reduce) for reduce in ("max", "above"))
        assert torch.equal(kept, methods.select(tokens, relevance, 6, **how)[0])
        told = {"grids": [(6, 6)], "above": above}
        assert torch.equal(by_focus, methods.select(tokens, relevance, 6, method="focus", **told)[0])


@pytest.mark.parametrize(
    ("family", "shown", "per", "grids"),
    [
        ("llava", 2, "image", [[(6, 6)], [(6, 6)]]),
        ("llava", 2, "request", [[(6, 6), (6, 6)]]),
        ("llava_next", 1, "image", [[(4, 4), (8, 8)]]),
        ("llava_next", 1, "tile", [[(4, 4)], None, None]),  # a line of patches runs through several tiles
        ("llava_onevision", 1, "image", [[(4, 4), (5, 5)]]),
        ("internvl", 1, "image", [[(4, 4), (4, 4)]]),
        ("internvl", 1, "tile", [[(4, 4)], [(4, 4)]]),
        ("qwen2_5_vl", 1, "image", [[(4, 6)]]),
        ("qwen3_vl", 1, "image", [[(4, 6)]]),
    ],
)
def test_a_method_is_told_the_grids_of_each_unit(family, shown, per, grids):
    model, inputs = make_inputs(family, [[4, *SIZES[family][:1] * shown, 6]])
    query = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with watched() as choices:
        prune_inputs(model, inputs, 3, query=query, per=per)
    (choice,) = choices
    told = [facts["grids"] for facts in choice.facts]
    assert told[: len(grids)] == grids
    places = torch.cat([g.rows for g in choice.visuals[0].grids])
    assert torch.equal(places, (~choice.visuals[0].newline).nonzero()[:, 0]), "every row but newlines, in their order"
    for facts, length in zip(choice.facts, choice.lengths, strict=True):
        if facts["grids"] is None:
            assert facts["above"] is None, "nothing would be chosen by it"
            continue
        assert facts["above"].shape == (1, length)
        assert sum(rows * columns for rows, columns in facts["grids"]) == length


@pytest.mark.parametrize("method", [3, "divprun", ["script"]])
def test_a_method_that_is_none_is_refused_before_any_work(method, monkeypatch):
    model, inputs = example("llava")

    def work(*_, **__):
        raise AssertionError("the encoder has run")

    monkeypatch.setattr(model.model, "get_image_features", work)
    with pytest.raises((TypeError, ValueError), match="method: expected a"):
        prune_inputs(model, inputs, 3, method=method)


def test_newlines_that_end_no_line_leave_the_grid_unknown():
    visual = plain("image", torch.randn(10, 4), torch.ones(10, dtype=torch.long))
    visual.newline[[4, 9]] = True
    (grid,) = _packed(visual, [])
    assert (grid.shape, len(grid.rows)) == (None, 8)
    visual.line[:5], visual.line[5:] = 0, 1
    assert [grid.shape for grid in _packed(visual, [])] == [(2, 4)]


def test_a_method_that_asks_for_nothing_is_told_nothing():
    model, inputs = example("llava")
    for method in ("script", "cdpruner", lambda tokens, relevance, keep: torch.arange(keep)[None]):
        with watched() as choices:
            prune_inputs(model, inputs, 3, method=method)
        assert choices[0].facts == [{}]
        assert choices[0].visuals[0].grids == []


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
        ({"reduce": "median"}, ValueError, "reduce: expected 'mean', 'max' or 'above', got 'median'"),
        ({"method": "dpp", "power": 2.0}, TypeError, "options: expected some of negate, ridge, got power"),
    ],
)
def test_bad_methods(arguments, error, message):
    model, inputs = example("llava")
    with pytest.raises(error, match=message):
        prune_inputs(model, inputs, 4, **arguments)


# --- calibration of a whole model

GRID = [
    Candidate("cdpruner", {"power": 2.0}, reduce="max"),
    Candidate("relevance", negate=True),
    Candidate("dpp", query=False),
    Candidate("script", {"gsp_drop": 0.5}),
]


def prompts(family: str, count: int = 2):
    made = [make_inputs(family, [[4, SIZES[family][0], 6]], seed=n) for n in range(count)]
    return made[0][0], [inputs for _, inputs in made]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_calibration_compares_what_generate_would_see(family):
    """Against a loop of its own: unpruned and pruned distributions after each token that the unpruned model said."""
    model, inputs = prompts(family)
    found = calibrate_model(model, inputs, keep=3, first_tokens=3, grid=GRID)
    assert [row.inputs for row in found.rows] == [2] * 4
    expected = {}
    for candidate in GRID:
        values = []
        for given in inputs:
            said = model.generate(**given, max_new_tokens=3, do_sample=False)[:, given["input_ids"].shape[1] :]
            # A candidate is all that it says and the method's own defaults, not those of an integration.
            how = {**methods.options_of(candidate.method), **candidate.options, "negate": candidate.negate}
            how |= {"method": candidate.method, "reduce": candidate.reduce}
            pruned = prune_inputs(model, given, 3, query="text" if candidate.query else None, **how)
            before = forced(model, given, said)
            after = forced(model, pruned, said)
            values.append(float((before.exp() * (before - after)).sum(-1).mean()))
        expected[candidate.key] = sum(values) / 2
    for row in found.rows:
        assert row.kl == pytest.approx(expected[row.candidate.key], rel=2e-3, abs=1e-5)
    assert len({round(row.kl, 6) for row in found.rows}) == 4
    assert found.best.key == min(expected, key=expected.__getitem__)


def forced(model, inputs, said):
    """Log-probabilities (tokens, words) of each token of `said`, by generate, made to say it."""

    def only(_, ids):  # of one prompt
        step = len(ids) - inputs["input_ids"].shape[1]
        return [int(said[0, step])]

    out = model.generate(
        **inputs,
        max_new_tokens=said.shape[1],
        do_sample=False,
        prefix_allowed_tokens_fn=only,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)[0].log_softmax(-1)


def test_a_calibration_goes_on_and_serves_prune_inputs(tmp_path):
    model, inputs = prompts("llava", 4)
    told = []
    first = calibrate_model(
        model, inputs, keep=4, grid=GRID, path=tmp_path / "seen.json", progress=lambda *step: told.append(step)
    )
    assert told[-1] == (16, 16)
    calls = []
    original = model.generate
    model.generate = lambda **given: calls.append(given) or original(**given)
    try:
        again = calibrate_model(model, inputs, keep=4, grid=GRID, path=tmp_path / "seen.json")
    finally:
        del model.generate
    assert not calls
    assert again == first
    first.save(tmp_path / "found.json")
    assert len(prune_inputs(model, inputs[0], calibration=tmp_path / "found.json").keep_indices[0]) == 4


def test_what_cannot_be_calibrated_is_refused():
    model, inputs = prompts("llava")
    for change, message in [
        ({"pixel_values": None}, r"inputs\[1\]: expected an image"),
        ({"input_ids": inputs[0]["input_ids"].repeat(2, 1)}, r"inputs\[1\]: expected input_ids of shape \(1, S\)"),
        ({"attention_mask": inputs[0]["attention_mask"] * 0}, r"inputs\[1\]: expected a prompt without padding"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate_model(model, [inputs[0], inputs[1] | change], keep=4, grid=GRID)
    with pytest.raises(ValueError, match="first_tokens"):
        calibrate_model(model, inputs, keep=4, first_tokens=0, grid=GRID)
    with pytest.raises(ValueError, match="keep: expected fewer than the 36 visual tokens"):
        calibrate_model(model, inputs, keep=36, grid=GRID)


def test_a_union_is_the_method_s_as_the_op_has_none():
    model, inputs = example("llava")
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    kept = prune_inputs(model, inputs, 9, query=None, combine="union").keep_indices[0]
    assert torch.equal(kept, methods.select(visual.features[None], None, 9, combine="union")[0])
