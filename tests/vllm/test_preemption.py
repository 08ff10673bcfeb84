"""Requests that give their blocks back while others answer, and are computed again: too few blocks for all of them."""

from typing import Any

import pytest
from conftest import CLOSE, distance


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_request_that_was_preempted_answers_as_alone(tell: Any, family: str) -> None:
    told = tell("preempted", family)
    images, answers = 2, told["together"]
    assert told["preempted"], "there were blocks enough for all"
    # What was lost is computed again, an image's rows among it.
    assert any(images for _, images in told["preempted"])
    lost = sum(done for done, _ in told["preempted"])
    assert sum(told["steps"]) == sum(answer["length"] + len(answer["tokens"]) - 1 for answer in answers) + lost
    assert told["encoded"] >= images
    for got, want in zip(answers, told["alone"], strict=True):
        assert distance(got, want) < CLOSE
