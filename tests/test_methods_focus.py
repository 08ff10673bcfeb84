"""The method `focus` and the relevance it is made for, each against a plain restatement."""

import itertools
import math

import pytest
import torch
from tiny_vlm import SIZES, make_inputs

import script_kernels
from script_kernels import methods, testing
from script_kernels.transformers import prune_inputs
from script_kernels.transformers.encode import encode

WIDTH = 12
N = WIDTH * WIDTH


def example(kind="clustered", seed=0, dtype=torch.float32):
    tokens = testing.make_tokens(kind, 2, N, 24, dtype=dtype, seed=seed)
    return tokens, testing.make_relevance(2, N, seed=seed) ** 3


def by_hand(tokens, relevance, keep, *, grid_width, least, most, typical, near=2):
    """Of one image, in float64 and loops; the last share by the method `script`."""
    n = len(tokens)
    rows = torch.nn.functional.normalize(tokens.double(), dim=-1)
    weights = ((rows @ rows.T) / 0.05).exp()
    mean = (weights @ relevance.double()) / weights.sum(1)
    seen = (mean - mean.min()) / (mean.max() - mean.min())
    score = seen**2
    grid = score.view(-1, grid_width)
    places = itertools.product(range(len(grid)), range(grid_width))
    squares = [grid[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1] for y, x in places]
    score = torch.stack([square.mean() for square in squares])
    whole = min(max((keep / n - 1 / 18) * 18, 0.0), 1.0)
    above = int((seen > 0.5).sum())
    wanted = min(max(2 * above, least * keep), most * keep) if above <= keep else least * keep / 2
    kept = sorted(range(n), key=lambda i: -score[i])[: int(wanted * whole + 1e-9)]
    left = [i for i in range(n) if i not in set(kept)]
    centre = rows[left].mean(0)
    plain = sorted(left, key=lambda i: -(rows[i] @ centre))[: int(typical * keep * whole + 1e-9)]
    kept += plain
    left = [i for i in range(n) if i not in set(kept)]
    rest = methods.select(
        *(tokens[None, left], relevance[None, left], keep - len(kept)),
        **{"floor": 0.3, "combine": "restrict", "survivors": 2.0},
    )
    return sorted(kept + [left[i] for i in rest[0].tolist()])


@pytest.mark.parametrize("grid_width", [WIDTH, 9, 144])
@pytest.mark.parametrize("keep", [72, 32, 16, 12, 9])
def test_focus_is_what_it_says(keep, grid_width):
    for seed, kind in enumerate(testing.KINDS):
        tokens, relevance = example(kind, seed)
        knobs = {"least": 0.5, "most": 0.625, "typical": 0.125}
        kept = methods.select(tokens, relevance, keep, method="focus", grid_width=grid_width, **knobs)
        for b in range(2):
            assert kept[b].tolist() == by_hand(tokens[b], relevance[b], keep, grid_width=grid_width, **knobs)


def test_a_small_budget_is_script_s():
    """Up to 1/18 of the tokens; and without a question, or a grid, always."""
    tokens, relevance = example()
    how = {"combine": "restrict", "survivors": 2.0, "floor": 0.3}
    focus = {"method": "focus", "grid_width": WIDTH}
    for keep in (1, 5, 8):
        kept = methods.select(tokens, relevance, keep, **focus)
        assert torch.equal(kept, methods.select(tokens, relevance, keep, **how))
    assert torch.equal(methods.select(tokens, None, 40, **focus), methods.select(tokens, None, 40, **how))
    plain = methods.select(tokens, relevance, 40, **how)
    assert torch.equal(methods.select(tokens, relevance, 40, method="focus"), plain)
    assert not torch.equal(methods.select(tokens, relevance, 40, **focus), plain)


def test_negate_turns_the_relevance_round():
    tokens, relevance = example()
    for keep in (6, 40):
        turned = methods.select(tokens, relevance, keep, method="focus", grid_width=WIDTH, negate=True)
        assert torch.equal(turned, methods.select(tokens, 1 - relevance, keep, method="focus", grid_width=WIDTH))


def test_every_knob_matters():
    tokens, relevance = example("powerlaw", 3)
    plain = methods.select(tokens, relevance, 40, method="focus", grid_width=WIDTH)
    for knobs in (
        *({"most": 0.5}, {"least": 0.0, "most": 0.0}, {"typical": 0.0}, {"near": 0}, {"grid_width": None}),
        *({"floor": 1.0}, {"survivors": 1.0}),
    ):
        asked = {"grid_width": WIDTH, **knobs}
        assert not torch.equal(plain, methods.select(tokens, relevance, 40, method="focus", **asked)), knobs


def test_tokens_with_a_nan_spread_nothing():
    tokens, relevance = example()
    tokens[:, 50:90, 0] = math.nan
    relevance[:, 60] = 5.0
    relevance[:, 10] = math.nan
    all_survive = {"method": "focus", "grid_width": WIDTH, "survivors": 64}  # GSP alone would rather drop good ones
    kept = methods.select(tokens, relevance, N - 41, **all_survive)
    assert set(kept[0].tolist()) == set(range(N)) - set(range(50, 90)) - {10}
    everything = methods.select(tokens, relevance, N, method="focus", grid_width=WIDTH)
    assert torch.equal(everything, torch.arange(N).expand(2, -1))
    assert methods.select(tokens[:0], relevance[:0], 20, method="focus").shape == (0, 20)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"grid_width": 7}, ValueError, "grid_width: expected a divisor of N = 144, .* got 7"),
        ({"grid_width": 0}, ValueError, "grid_width: expected grid_width >= 1, got 0"),
        ({"near": -1}, ValueError, "near: expected near >= 0, got -1"),
        ({"near": 1.5}, TypeError, "near: expected an int"),
        ({"most": 0.4}, ValueError, "most: expected least <= most <= 1 - typical, got 0.5, 0.4 and 0.125"),
        ({"most": 0.9}, ValueError, "most: expected least <= most <= 1 - typical"),
        ({"typical": -0.1}, ValueError, "typical: expected 0 <= typical <= 1, got -0.1"),
        ({"survivors": None}, TypeError, "survivors: expected a float"),
        ({"survivors": 0.5}, ValueError, "survivors: expected 1 <= survivors"),
        ({"floor": 2.0}, ValueError, "floor: expected"),
    ],
    ids=str,
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


def test_prune_inputs_uses_both_with_a_question():
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    tokens = visual.features[None]
    query = torch.randn(3, tokens.shape[2], generator=torch.Generator().manual_seed(1))
    relevance = methods.relevance_of(tokens, query[None], reduce="above")
    kept = prune_inputs(model, inputs, 18, query=query, method="focus", grid_width=6)
    expected = methods.select(tokens, relevance, 18, method="focus", grid_width=6)
    assert torch.equal(kept.keep_indices[0], expected[0])
    torch.testing.assert_close(kept.scores[0], relevance[0])
    with pytest.raises(ValueError, match="grid_width: expected a divisor of N = 36"):
        prune_inputs(model, inputs, 18, query=query, method="focus", grid_width=7)
