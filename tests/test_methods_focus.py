"""The method `focus` and the relevance it is made for, each against a plain restatement."""

import itertools
import math
import sys

import pytest
import torch
from tiny_vlm import SIZES, make_inputs

import script_kernels
from script_kernels import methods, testing
from script_kernels.methods.dpp import script_stages
from script_kernels.transformers import prune_inputs
from script_kernels.transformers.encode import encode

WIDTH = 12
N = WIDTH * WIDTH
SQUARE = [(WIDTH, WIDTH)]
focus_module = sys.modules["script_kernels.methods.focus"]  # the package has the function by that name


def example(kind="clustered", seed=0, dtype=torch.float32):
    tokens = testing.make_tokens(kind, 2, N, 24, dtype=dtype, seed=seed)
    return tokens, testing.make_relevance(2, N, seed=seed) ** 3


def by_hand(tokens, relevance, keep, *, grids, least, most, typical, near=2, above=None):
    """Of one image, in float64 and loops; the last share by the method `script`, of which what is kept is no part."""
    n = len(tokens)
    rows = torch.nn.functional.normalize(tokens.double(), dim=-1)
    own = (relevance if above is None else above).double()
    grid_of = torch.cat([torch.full((h * w,), g) for g, (h, w) in enumerate(grids)])
    weights = ((rows @ rows.T) / 0.05).exp() * (grid_of[:, None] == grid_of)
    mean = (weights @ own) / weights.sum(1)
    seen = (mean - mean.min()) / (mean.max() - mean.min())
    score, start = [], 0
    for height, width in grids:
        grid = (seen**2)[start : start + height * width].view(height, width)
        start += height * width
        for y, x in itertools.product(range(height), range(width)):
            score.append(grid[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1].mean())
    middle = float(seen.sort().values[(n - 1) // 2])
    whole = min(max((keep / n - 1 / 18) * 18, 0.0), 1.0)
    may = (most + typical) * whole * keep
    survivors = (may + 2 * (keep - may)) / keep
    whole *= min(max((0.25 - middle) * 8, 0.0), 1.0)
    above_half = int((seen > 0.5).sum())
    wanted = min(max(2 * above_half, least * keep), most * keep) if above_half <= keep else least * keep / 2
    kept = sorted(range(n), key=lambda i: -score[i])[: int(wanted * whole + 1e-9)]
    centre = rows.mean(0)
    others = [i for i in range(n) if i not in set(kept)]
    kept += sorted(others, key=lambda i: -(rows[i] @ centre))[: int(typical * keep * whole + 1e-9)]
    left, own = tokens.clone(), relevance.clone()
    left[kept], own[kept] = 0.0, math.nan
    stages = script_stages(left[None], own[None], keep, floor=0.3, combine="restrict", survivors=survivors)
    rest = [i for i in stages.order[0].tolist() if i not in set(kept)]
    return sorted(kept + rest[: keep - len(kept)])


KNOBS = {"least": 0.5, "most": 0.625, "typical": 0.125}


@pytest.mark.parametrize(
    "grids",
    [
        [(WIDTH, WIDTH)],
        [(16, 9)],
        [(1, 144)],
        [(6, 8), (12, 8)],
        [(1, 1), (11, 13)],
        [(4, 6)] * 6,
        [(3, 8), (6, 4), (6, 4), (9, 8)],
    ],
)
@pytest.mark.parametrize("keep", [144, 72, 32, 16, 12, 9])
def test_focus_is_what_it_says(keep, grids):
    shared = 0
    for seed, kind in enumerate(testing.KINDS):
        tokens, relevance = example(kind, seed)
        above = testing.make_relevance(2, N, seed=seed + 50) ** 4
        for second in (None, above):
            told = {"grids": grids, "above": second, **KNOBS}
            kept = methods.select(tokens, relevance, keep, method="focus", **told)
            for b in range(2):
                told["above"] = None if second is None else second[b]
                assert kept[b].tolist() == by_hand(tokens[b], relevance[b], keep, **told)
            plain = methods.select(tokens, relevance, keep, **PLAIN)
            shared += not torch.equal(kept, plain)
    assert shared or keep in (9, 144)


PLAIN = {"combine": "restrict", "survivors": 2.0, "floor": 0.3}


def test_a_small_budget_is_script_s():
    """Up to 1/18 of the tokens; and without a question, or a grid, always."""
    tokens, relevance = example()
    focus = {"method": "focus", "grids": SQUARE}
    for keep in (1, 5, 8):
        kept = methods.select(tokens, relevance, keep, **focus)
        assert torch.equal(kept, methods.select(tokens, relevance, keep, **PLAIN))
    assert torch.equal(methods.select(tokens, None, 40, **focus), methods.select(tokens, None, 40, **PLAIN))
    plain = methods.select(tokens, relevance, 40, **PLAIN)
    assert torch.equal(methods.select(tokens, relevance, 40, method="focus"), plain)
    assert not torch.equal(methods.select(tokens, relevance, 40, **focus), plain)


def test_a_relevance_that_points_nowhere_gets_no_share():
    """Chance, all but a few tokens, and one value for all: `script`, token for token; a few tokens: a share.

    Of survivors there are as many as if the shares were whole: GSP cannot know.
    """
    tokens = testing.make_tokens("clustered", 8, N, 24, seed=3)
    few = torch.zeros(8, N)
    few[:, 30:40] = 1.0
    chance = torch.rand(8, N, generator=torch.Generator().manual_seed(0))
    for relevance, same in ((chance, True), (1 - few, True), (torch.full((8, N), 0.7), True), (few, False)):
        plain = methods.select(tokens, relevance, 40, **PLAIN | {"survivors": 1.25})
        assert torch.equal(methods.select(tokens, relevance, 40, method="focus", grids=SQUARE), plain) == same


def test_what_it_looks_at_of_a_few_similarities_at_a_time(monkeypatch):
    tokens, relevance = example("powerlaw", 3)
    for grids in (SQUARE, [(6, 6)] * 4, [(4, 9), (9, 4), (9, 4), (6, 6)]):
        monkeypatch.setattr(focus_module, "MOST", 2**24)
        whole = methods.select(tokens, relevance, 40, method="focus", grids=grids)
        for most in (7 * N, 36 * 36 * 2, 36 * 5, 1):
            monkeypatch.setattr(focus_module, "MOST", most)
            assert torch.equal(methods.select(tokens, relevance, 40, method="focus", grids=grids), whole)


def test_an_image_alone_is_chosen_as_in_a_batch():
    for kind in testing.KINDS:
        tokens = testing.make_tokens(kind, 5, N, 40, seed=9)
        relevance = testing.make_relevance(5, N, seed=9) ** 3
        batch = methods.select(tokens, relevance, 40, method="focus", grids=SQUARE)
        for b in range(5):
            own = methods.select(tokens[b : b + 1], relevance[b : b + 1], 40, method="focus", grids=SQUARE)
            assert torch.equal(own[0], batch[b])


def test_negate_turns_both_relevances_round():
    tokens, relevance = example()
    above = testing.make_relevance(2, N, seed=5) ** 4
    for keep in (6, 40):
        given = methods.select(tokens, relevance, keep, method="focus", grids=SQUARE, above=above)
        turned = {"method": "focus", "grids": SQUARE, "negate": True}
        assert torch.equal(methods.select(tokens, 1 - relevance, keep, **turned, above=1 - above), given)


def test_every_knob_matters():
    tokens, relevance = example("powerlaw", 3)
    plain = methods.select(tokens, relevance, 40, method="focus", grids=SQUARE)
    for knobs in (
        *({"most": 0.5}, {"least": 0.0, "most": 0.0}, {"typical": 0.0}, {"near": 0}, {"grids": None}),
        *({"floor": 1.0}, {"survivors": 1.0}, {"grids": [(24, 6)]}, {"above": relevance.roll(40, 1)}),
    ):
        asked = {"grids": SQUARE, **knobs}
        assert not torch.equal(plain, methods.select(tokens, relevance, 40, method="focus", **asked)), knobs


def test_tokens_with_a_nan_spread_nothing():
    tokens, relevance = example()
    tokens[:, 50:90, 0] = math.nan
    relevance[:, 60] = 5.0
    relevance[:, 10] = math.nan
    all_survive = {"method": "focus", "grids": SQUARE, "survivors": 64}  # GSP alone would rather drop good ones
    kept = methods.select(tokens, relevance, N - 41, **all_survive)
    assert set(kept[0].tolist()) == set(range(N)) - set(range(50, 90)) - {10}
    everything = methods.select(tokens, relevance, N, method="focus", grids=SQUARE)
    assert torch.equal(everything, torch.arange(N).expand(2, -1))
    assert methods.select(tokens[:0], relevance[:0], 20, method="focus", grids=SQUARE).shape == (0, 20)
    tokens[0] = math.nan
    for keep in (1, 20, 90, N):
        kept = methods.select(tokens, relevance, keep, method="focus", grids=SQUARE)
        assert all(len(set(own)) == keep for own in kept.tolist())


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_comes_in_so_many_stay(kind, dtype):
    for n, keep in ((1, 1), (2, 1), (17, 2), (30, 29), (64, 8), (97, 20)):
        tokens = testing.make_tokens(kind, 2, n, 16, dtype=dtype, seed=n)
        relevance = testing.make_relevance(2, n, seed=n) ** 6
        kept = methods.select(tokens, relevance, keep, method="focus", grids=[(1, n)])
        assert kept.shape == (2, keep)
        assert all(own[0] >= 0 and own[-1] < n and (own.diff() > 0).all() for own in kept)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"grids": [(7, 12)]}, ValueError, "grids: expected N = 144 tokens in them, got 84"),
        ({"grids": [(0, 12)]}, ValueError, r"grids: expected rows and columns >= 1, got \(0, 12\)"),
        ({"grids": [(12, 12.0)]}, TypeError, "grids: expected an int, got float"),
        ({"grids": [12, 12]}, ValueError, r"grids: expected a sequence of \(rows, columns\), got 12 in it"),
        ({"grids": 12}, TypeError, r"grids: expected a sequence of \(rows, columns\), got int"),
        ({"above": torch.ones(2, 9)}, ValueError, r"above: expected shape \(2, 144\), got \(2, 9\)"),
        ({"above": torch.ones(2, N).double()}, TypeError, "above: expected float32, got float64"),
        ({"near": -1}, ValueError, "near: expected near >= 0, got -1"),
        ({"near": 1.5}, TypeError, "near: expected an int"),
        ({"most": 0.4}, ValueError, "most: expected least <= most <= 1 - typical, got 0.5, 0.4 and 0.125"),
        ({"most": 0.9}, ValueError, "most: expected least <= most <= 1 - typical"),
        ({"typical": -0.1}, ValueError, "typical: expected 0 <= typical <= 1, got -0.1"),
        ({"survivors": None}, TypeError, "survivors: expected a float"),
        ({"survivors": 0.5}, ValueError, "survivors: expected 1 <= survivors"),
        ({"floor": 2.0}, ValueError, "floor: expected"),
    ],
)
def test_errors(knobs, error, message):
    tokens, relevance = example()
    with pytest.raises(error, match=message):
        methods.select(tokens, relevance, 30, method="focus", **knobs)


# --- the relevance above the median


def test_above_is_the_largest_cosine_above_its_median():
    tokens = testing.make_tokens("powerlaw", 2, 75, 16)
    query = testing.make_query(2, 4, 16)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    for negate in (False, True):
        found = methods.relevance_of(tokens, query, mask, reduce="above", negate=negate)
        x, y = (torch.nn.functional.normalize(z.double(), dim=-1) for z in (tokens, query))
        for b in range(2):
            cosine = x[b] @ y[b].T * (-1 if negate else 1)
            above = (cosine - cosine.median(0).values)[:, mask[b]].max(1).values
            expected = (above - above.min()) / (above.max() - above.min())
            torch.testing.assert_close(found[b].double(), expected, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32


def test_above_leaves_bad_tokens_and_words_out():
    tokens, query = testing.make_tokens("gaussian", 1, 31, 8), testing.make_query(1, 3, 8)
    good = methods.relevance_of(tokens[:, 2:], query[:, :2], reduce="above")
    tokens[0, 0, 3], tokens[0, 1, 0], query[0, 2, 1] = math.inf, math.nan, math.nan
    found = methods.relevance_of(tokens, query, reduce="above")
    assert found[0, :2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[:, 2:], good)
    same = methods.relevance_of(torch.ones(1, 5, 8), query[:, :2], reduce="above")
    assert same.tolist() == [[1.0] * 5]
    assert methods.relevance_of(torch.ones(1, 5, 8), query[:, 2:], reduce="above").tolist() == [[1.0] * 5]
    with pytest.raises(ValueError, match="query: expected shape"):
        methods.relevance_of(tokens, query[..., :5], reduce="above")
    with pytest.raises(ValueError, match="reduce: expected 'mean' or 'max', got 'sum'"):
        methods.relevance_of(tokens, query, reduce="sum")
    with pytest.raises(ValueError, match="reduce: expected 'mean' or 'max', got 'above'"):
        script_kernels.query_relevance(tokens, query, reduce="above")


# --- in transformers


def of_llava(sign=1):
    """The model's inputs and tokens, and a question that fits some of them, or with -1 is the contrary of them."""
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    tokens = visual.features.detach()[None]
    return model, inputs, tokens, sign * tokens[0, [7, 8, 20]]


@pytest.mark.parametrize("negate", [False, True])
def test_prune_inputs_focuses_with_a_question(negate, monkeypatch):
    """By default, with both relevances and the model's own grid."""
    monkeypatch.setattr(focus_module, "CLEAR", 2.0)  # a random model's relevance points nowhere
    monkeypatch.setattr(focus_module, "VAGUE", 3.0)
    model, inputs, tokens, query = of_llava(-1 if negate else 1)
    told = {
        name: methods.relevance_of(tokens, query[None], reduce=reduce, negate=negate)
        for name, reduce in (("relevance", "max"), ("above", "above"))
    }
    loud = {"least": 0.5, "typical": 0.25}
    expected = methods.select(tokens, keep=18, method="focus", grids=[(6, 6)], **told, **loud)
    kept = prune_inputs(model, inputs, 18, query=query, negate=negate, **loud)
    assert torch.equal(kept.keep_indices[0], expected[0])
    torch.testing.assert_close(kept.scores[0], told["relevance"][0])
    plain = prune_inputs(model, inputs, 18, query=query, negate=negate, method="script")
    assert not torch.equal(plain.keep_indices[0], expected[0]), "the example tells the two apart"


def test_what_names_an_option_of_script_gets_script():
    model, inputs, tokens, query = of_llava()
    for options in ({"gsp_drop": 0.4}, {"mix": 0.5}, {"combine": "intersect", "floor": 0.1}):
        kept = prune_inputs(model, inputs, 18, query=query, **options)
        script = prune_inputs(model, inputs, 18, query=query, method="script", **options)
        assert torch.equal(kept.keep_indices[0], script.keep_indices[0])
    without = prune_inputs(model, inputs, 18, query=None)
    assert torch.equal(without.keep_indices[0], script_kernels.prune(tokens, None, 18)[0])
    with pytest.raises(TypeError, match="options: expected those of 'focus' or of 'script' alone, got mix, near"):
        prune_inputs(model, inputs, 18, query=query, mix=0.5, near=1)
    with pytest.raises(TypeError, match=r"options: expected some of .*, got grids"):
        prune_inputs(model, inputs, 18, query=query, grids=[(6, 6)])
