"""Checkered sources and destinations: an option of the methods that have a graph."""

import pytest
import torch
from tiny_vlm import SIZES, make_inputs

from script_kernels import methods, reference
from script_kernels.methods.dpp import script_stages
from script_kernels.options import rounds_needed

GRAPH = {"combine": "restrict", "survivors": 2.0}
WIDTH, HEIGHT = 6, 8
N = WIDTH * HEIGHT


def example(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 16, generator=generator), torch.rand(2, n, generator=generator)


def swapped(n, width):
    """The order in plain Python: in odd rows of an even width each pair of neighbours changes places."""
    order = list(range(n))
    for row in range(1, n // width, 2):
        for column in range(0, width - 1, 2):
            a = row * width + column
            order[a], order[a + 1] = order[a + 1], order[a]
    return torch.tensor(order)


def dropped(kept, n=N):
    return [sorted(set(range(n)) - set(row.tolist())) for row in kept]


@pytest.mark.parametrize("method", ["gsp", "tome_drop"])
def test_one_round_drops_squares_of_a_checkerboard_instead_of_columns(method):
    tokens, _ = example()
    for keep in (N // 2, 3 * N // 4):
        for gone in dropped(methods.select(tokens, None, keep, method=method)):
            assert {t % WIDTH % 2 for t in gone} == {0}
        for gone in dropped(
            methods.select(tokens, None, keep, method=method, split="checker", grid_width=WIDTH),
        ):
            assert {(t // WIDTH + t % WIDTH) % 2 for t in gone} == {0}
            assert {t % WIDTH % 2 for t in gone} == {0, 1}


def test_gsp_is_the_reference_on_the_swapped_tokens():
    tokens, _ = example()
    order = swapped(N, WIDTH)
    for keep in (N // 2, 9):
        mask, _ = reference.gsp(tokens[:, order], keep, rounds=rounds_needed(N, keep), dtype=torch.float64)
        expected = torch.stack([order[row].sort().values for row in mask])
        kept = methods.select(tokens, None, keep, method="gsp", split="checker", grid_width=WIDTH)
        assert torch.equal(kept, expected)
        assert not torch.equal(kept, methods.select(tokens, None, keep, method="gsp"))


@pytest.mark.parametrize("options", [{}, GRAPH, {"combine": "union"}, {"gsp_drop": 0.5, "oversample": 3.0}])
def test_script_and_its_stages_come_back_in_the_order_of_the_tokens(options):
    tokens, relevance = example()
    order = swapped(N, WIDTH)
    found = script_stages(tokens, relevance, 12, split="checker", grid_width=WIDTH, **options)
    plain = script_stages(tokens[:, order], relevance[:, order], 12, **options)
    assert torch.equal(found.kept, order[plain.kept].sort(1).values)
    assert torch.equal(found.order, order[plain.order])
    assert torch.equal(found.gains, plain.gains)
    assert torch.equal(found.mask[:, order], plain.mask)
    assert torch.equal(found.redundancy[:, order], plain.redundancy)


def test_tome_drop_is_its_rule_on_the_swapped_tokens():
    tokens, _ = example()
    order = swapped(N, WIDTH)
    kept = methods.select(tokens, None, 10, method="tome_drop", split="checker", grid_width=WIDTH)
    plain = methods.select(tokens[:, order], None, 10, method="tome_drop")
    assert torch.equal(kept, order[plain].sort(1).values)


@pytest.mark.parametrize("method", ["gsp", "tome_drop", "script"])
def test_an_odd_width_is_a_checkerboard_already(method):
    tokens, relevance = example(45)
    plain = methods.select(tokens, relevance, 20, method=method)
    assert torch.equal(plain, methods.select(tokens, relevance, 20, method=method, split="checker", grid_width=9))


@pytest.mark.parametrize("method", ["gsp", "tome_drop", "script"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "checker"}, ValueError, "grid_width: expected the tokens of a row"),
        ({"split": "checker", "grid_width": 7}, ValueError, f"grid_width: expected a divisor of N = {N}, .* got 7"),
        ({"split": "checker", "grid_width": 0}, ValueError, "grid_width: expected grid_width >= 1, got 0"),
        ({"split": "checker", "grid_width": 6.0}, TypeError, "grid_width: expected an int, got float"),
        ({"grid_width": 6}, ValueError, "grid_width: expected it with split='checker' only, got 6"),
        ({"split": "stripes"}, ValueError, "split: expected 'raster' or 'checker', got 'stripes'"),
    ],
)
def test_a_split_that_cannot_be_names_itself(method, options, error, message):
    tokens, relevance = example()
    with pytest.raises(error, match=message):
        methods.select(tokens, relevance, 12, method=method, **options)


def test_prune_inputs_takes_a_split():
    model, inputs = make_inputs("llava", [[4, SIZES["llava"][0], 6]])
    found = {}
    for options in ({}, {"split": "checker", "grid_width": 6}):
        found[bool(options)] = prune(model, inputs, method="gsp", query=None, **options)
    assert {t % 6 % 2 for t in dropped([found[False]], 36)[0]} == {0}
    assert {(t // 6 + t % 6) % 2 for t in dropped([found[True]], 36)[0]} == {0}
    asked = prune(model, inputs, method="script", split="checker", grid_width=6)
    assert len(asked) == 18
    with pytest.raises(ValueError, match="grid_width: expected a divisor of N = 36"):
        prune(model, inputs, method="script", split="checker", grid_width=7)


def prune(model, inputs, **options):
    from script_kernels.transformers import prune_inputs

    return prune_inputs(model, inputs, 18, **options).keep_indices[0]
