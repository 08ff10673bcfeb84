"""Nothing is configured, or all is kept: the stock engine, bit for bit."""

import math
from typing import Any

import pytest
from scenarios import RATIO, SIZES


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_nothing_configured_is_the_stock_engine(tell: Any, family: str) -> None:
    stock, off = tell("stock", family, VLLM_PLUGINS=""), tell("stock", family)
    assert off["answers"] == stock["answers"]
    assert tell("pruned", family)["all"] == stock["answers"]
    assert off["request"].startswith("script_keep_ratio: expected an engine that was started with script_keep")


def test_an_engine_that_is_not_quite_the_stock_one_is_told_apart(tell: Any) -> None:
    stock, planted = tell("stock", "llava", VLLM_PLUGINS=""), tell("planted", "llava")
    differ = [a != b for a, b in zip(planted["answers"], stock["answers"], strict=True)]
    assert differ == [bool(sizes) for sizes in SIZES]


def test_bfloat16_carries_positions_that_it_could_not_count(tell: Any) -> None:
    told = tell("half", "qwen2_5_vl")
    (chosen,), (places,), ((_, height, width),) = told["chosen"], told["places"], told["grids"]
    columns = width // 2  # two patches a token
    assert columns > 257, "the image is too narrow to tell"
    assert height == 4
    assert len(chosen) == math.ceil(RATIO * columns * height / 2)
    assert places == [[0, row // columns, row % columns] for row in chosen]
    assert max(place[2] for place in places) > 256
    chunked = told["chunked"]["places"]
    assert len(chunked) > 1
    assert [place for step in chunked for place in step] == places
