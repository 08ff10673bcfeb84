"""The vLLM plugin's choice of rows in one encoder step, and the positions that rows carry."""

import pytest
import torch

from script_kernels import methods, prune
from script_kernels.vllm.select import (
    attach_positions,
    choose,
    detach_positions,
    grid_positions,
    newline_rows,
    unit_mean,
)
from script_kernels.vllm.settings import Order, Rule, Settings

RULE = Settings().rule


def order(before: int, after: int, newlines: int = 0, rule: Rule = RULE) -> Order:
    return Order(before, after, newlines, rule)


def features(*lengths: int, width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, width, generator=generator) for length in lengths]


def test_each_image_of_a_step_is_chosen_as_alone() -> None:
    rows, queries = features(40, 64, 25, 30, 50), [None, features(1)[0], None, features(2)[0][:1], None]
    orders = [order(40, 9), order(64, 16), order(25, 25), order(30, 0), order(50, 12)]
    chosen = choose(rows, orders, queries, 32)
    assert chosen[2] is None  # all of it stays
    assert chosen[3] is None  # not ours to prune
    for i in (0, 1, 4):
        query = None if queries[i] is None else queries[i][None]
        alone = prune(rows[i][None], query, orders[i].after)[0]
        assert torch.equal(chosen[i], alone)
        assert torch.equal(chosen[i], choose(rows[i : i + 1], orders[i : i + 1], queries[i : i + 1], 32)[0])


def test_images_with_other_options_are_chosen_by_them() -> None:
    rows = features(64)[0]
    other = Settings(options={"gsp_drop": 0.49}).rule
    both = choose([rows, rows], [order(64, 16), order(64, 16, rule=other)], [None, None], 32)
    assert torch.equal(both[0], prune(rows[None], None, 16)[0])
    assert torch.equal(both[1], prune(rows[None], None, 16, gsp_drop=0.49)[0])
    assert not torch.equal(both[0], both[1])


def test_focus_is_told_the_grids_and_a_second_relevance() -> None:
    images, words = features(40, 64, 30), features(5, 3, 4)
    grids = [[(5, 8)], [(4, 4), (6, 8)], None]
    for negate in (False, True):
        rule = Settings(query="text", options={"negate": negate, "near": 1}).rule
        assert rule.method == "focus"
        chosen = choose(images, [order(len(rows), 15, rule=rule) for rows in images], words, 32, 0, grids)
        for rows, query, lie, kept in zip(images, words, grids, chosen, strict=True):
            relevance, above = (
                methods.relevance_of(rows[None], query[None], reduce=reduce, negate=negate)
                for reduce in ("max", "above")
            )
            told = {"method": "focus", "above": above, "grids": lie, "near": 1}
            assert torch.equal(kept, methods.select(rows[None], relevance, 15, **told)[0])


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_every_method_chooses_as_alone(method: str, reduce: str) -> None:
    images, words = features(40, 64, 30), features(5, 3, 4)
    options = {"negate": True, **({"power": 2.0, "floor": 0.1} if method in ("script", "cdpruner") else {})}
    rule = Settings(query="text", method=method, reduce=reduce, options=options).rule
    own = {name: value for name, value in rule.options if name != "negate"}
    for asked in (True, False):
        queries = list(words) if asked else [None] * 3
        chosen = choose(images, [order(len(rows), 9, rule=rule) for rows in images], queries, 32)
        for rows, query, kept in zip(images, queries, chosen, strict=True):
            how = {"reduce": rule.reduce, "negate": True}
            relevance = None if query is None else methods.relevance_of(rows[None], query[None], **how)
            assert torch.equal(kept, methods.select(rows[None], relevance, 9, method=method, **own)[0])


def test_only_the_first_channels_are_compared() -> None:
    rows = features(50)[0]
    wide = torch.cat([rows, 1e3 * torch.randn(50, 64)], dim=1)
    assert torch.equal(choose([wide], [order(50, 11)], [None], 32)[0], choose([rows], [order(50, 11)], [None], 32)[0])


def test_newline_rows_are_never_chosen() -> None:
    one = order(16 + 4 * 6, 12, newlines=4)  # a base view of 16 rows, then 4 lines of 5 and their newlines
    assert newline_rows(one, 16).nonzero()[:, 0].tolist() == [21, 27, 33, 39]
    rows = features(40)[0]
    (chosen,) = choose([rows], [one], [None], 32, base=16)
    assert not set(chosen.tolist()) & {21, 27, 33, 39}
    assert len(chosen) == 12
    content = torch.tensor([i for i in range(40) if i not in (21, 27, 33, 39)])
    assert torch.equal(chosen, content[prune(rows[content][None], None, 12)[0]])


@pytest.mark.parametrize(("rows", "before"), [(41, 40), (39, 40)])
def test_another_number_of_rows_than_placeholders_is_refused(rows: int, before: int) -> None:
    with pytest.raises(RuntimeError, match=f"expected {before}, as the prompt was made for, got {rows}"):
        choose(features(rows), [order(before, 9)], [None], 32)
    with pytest.raises(RuntimeError, match=f"expected {before}"):
        choose(features(rows), [order(before, before)], [None], 32)
    with pytest.raises(RuntimeError, match=r"expected 4 lines after 16 rows, got 23 rows"):
        newline_rows(order(39, 9, newlines=4), 16)


def test_one_vector_stands_for_all_words() -> None:
    words, rows = features(7, 40)
    mean = (torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T).mean(1)
    one = torch.nn.functional.normalize(rows, dim=-1) @ unit_mean(words)[0]
    torch.testing.assert_close(one, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_position_survives_in_every_dtype(dtype: torch.dtype) -> None:
    """Bit patterns: among them are those of NaNs and of numbers that are rounded to nought where one computes."""
    count = 32768  # all that 15 bits hold
    places = torch.stack([torch.arange(count), torch.arange(count).flip(0), torch.zeros(count).long()], dim=1)
    rows = torch.randn(count, 8).to(dtype)
    carried = attach_positions(rows, places)
    assert carried.dtype == dtype
    assert carried.shape == (count, 11)
    for start, stop in ((0, count), (5, 6), (257, 4000)):  # a chunk is a slice
        own, positions = detach_positions(carried[start:stop].clone())
        assert torch.equal(own, rows[start:stop])
        assert torch.equal(positions, places[start:stop])


def test_positions_beyond_the_dtype_are_refused() -> None:
    rows = torch.zeros(1, 4, dtype=torch.bfloat16)
    for bad in (32768, -1):
        with pytest.raises(RuntimeError, match="positions: expected 0 to 32767"):
            attach_positions(rows, torch.tensor([[0, bad, 0]]))
    assert attach_positions(rows.float(), torch.tensor([[0, 32768, 0]])).shape == (1, 7)


def test_positions_of_a_grid() -> None:
    assert grid_positions((1, 2, 3)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
