"""Encoder and language model as two engines, with vLLM's example connector between them: files in a folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CLOSE, distance

KEEP = 0.22
QUESTION = "script_query: expected None where the encoder runs without the language model, got 'text'"


@pytest.fixture(scope="module", params=["qwen2_5_vl"])
def halves(request: pytest.FixtureRequest, tell: Callable[..., Any], tmp_path_factory: Any) -> dict[str, Any]:
    """What the stock encoder wrote, and what the pruning one wrote and the other half read."""
    family = request.param
    stores: dict[str, Path] = {name: tmp_path_factory.mktemp(name) for name in ("stock", "pruned")}
    # The halves name the model alike: its name is part of an image's identity.
    model = str(tmp_path_factory.mktemp("halves") / "model")
    pruning = {"STORE": str(stores["pruned"]), "KEEP": str(KEEP), "MODEL": model}
    told = {
        "stock": tell("encoder", family, STORE=str(stores["stock"]), MODEL=model, VLLM_PLUGINS=""),
        "encoder": tell("encoder", family, **pruning),
        "consumer": tell("consumer", family, **pruning),
    }
    for store in stores.values():
        shutil.rmtree(store)
    return told


@pytest.mark.parametrize(("part", "images"), [("one", 1), ("eight", 8)])
def test_the_rows_that_stayed_are_what_is_moved(halves: dict[str, Any], part: str, images: int) -> None:
    stock, pruned, read = halves["stock"][part], halves["encoder"][part], halves["consumer"][part]
    assert stock["encoded"] == pruned["encoded"] == images
    assert len(stock["files"]) == len(pruned["files"]) == images
    assert sum(pruned["files"].values()) <= 0.23 * sum(stock["files"].values())
    assert all(name.startswith(f"script-ratio{KEEP}-") for name in pruned["files"])
    # The other half encodes nothing, and holds just these rows.
    assert read["encoded"] == 0
    assert set(pruned["files"]) <= set(read["rows"])
    for name, size in pruned["files"].items():
        rows, width = read["rows"][name]
        assert rows == len(pruned["chosen"][0])
        assert 0 < size - 4 * rows * width < 200  # float32 and a header


def test_the_answers_are_those_of_one_engine(halves: dict[str, Any]) -> None:
    read, own = halves["consumer"]["one"]["answers"] + halves["consumer"]["eight"]["answers"], halves["consumer"]["own"]
    assert own["encoded"] == 9
    for got, want in zip(read, own["answers"], strict=True):
        assert got["length"] == want["length"]
        assert distance(got, want) < CLOSE


def test_no_question_is_asked_of_an_encoder_alone(halves: dict[str, Any]) -> None:
    assert QUESTION in halves["encoder"]["question"]
