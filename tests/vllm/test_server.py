"""The OpenAI-compatible server with the plugin on: what it counts, streams and refuses."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from conftest import clean_environment
from server import Server, serving

TOKENS, KEPT = 36, 15  # of an image, and ceil(0.4 * 36)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    tiny.save("llava", folder / "model")
    (folder / "metrics").mkdir()
    environment = clean_environment(PROMETHEUS_MULTIPROC_DIR=str(folder / "metrics"), SCRIPT_KEEP_RATIO="0.4")
    with serving(folder / "model", folder / "log", environment) as running:
        yield running


def answer(server: Server, *arguments: Any, **extra: Any) -> dict[str, Any]:
    status, body = server.chat(*arguments, **extra)
    assert status == 200, body
    told: dict[str, Any] = json.loads(body)
    return told


def counters(server: Server) -> dict[str, float]:
    found = re.findall(r"^(script_kernels_\w+?)(?:\{[^}]*\})? ([\d.e+-]+)$", server.get("/metrics"), re.MULTILINE)
    return {name: float(value) for name, value in found if not name.endswith(("_bucket", "_created"))}


def test_prompt_tokens_fall_by_what_was_pruned(server: Server) -> None:
    image = tiny.picture(80, 80, seed=1)
    short = answer(server, "w1 w2 w3", image)["usage"]["prompt_tokens"]
    whole = answer(server, "w1 w2 w3", image, mm_processor_kwargs={"script_keep_ratio": 1})["usage"]["prompt_tokens"]
    tight = answer(server, "w1 w2 w3", image, mm_processor_kwargs={"script_keep": 4})["usage"]["prompt_tokens"]
    assert whole - short == TOKENS - KEPT
    assert whole - tight == TOKENS - 4
    assert answer(server, "w1 w2 w3")["usage"]["prompt_tokens"] == whole - TOKENS


def test_the_same_image_again_and_another_question(server: Server) -> None:
    """The server's process no longer sends an image that the engine's holds."""
    image = tiny.picture(80, 80, seed=2)
    first = [answer(server, text, image)["choices"] for text in ("w5 w6", "w7 w8 w9")]
    again = [answer(server, text, image)["choices"] for text in ("w5 w6", "w7 w8 w9")]
    assert [one[0]["message"] for one in first] == [one[0]["message"] for one in again]


def test_streams(server: Server) -> None:
    image = tiny.picture(80, 80, seed=3)
    whole = answer(server, "w1 w4", image)
    status, body = server.chat("w1 w4", image, stream=True, stream_options={"include_usage": True})
    assert status == 200
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert parts[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    text = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert len(parts) > 3


def test_counts_on_the_metrics_page_and_in_the_log(server: Server) -> None:
    before = counters(server)
    answer(server, "w1 w2", tiny.picture(80, 80, seed=4))
    after = counters(server)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["script_kernels_visual_tokens_before_total"] == TOKENS
    assert gained["script_kernels_visual_tokens_after_total"] == KEPT
    assert gained["script_kernels_selection_seconds_count"] == 1
    assert 0 < gained["script_kernels_selection_seconds_sum"] < 10
    log = server.log.read_text()
    assert f"request: {TOKENS} -> {KEPT} visual tokens in 1 images" in log
    assert re.search(rf"encoder step: {TOKENS} -> {KEPT} visual tokens in 1 images, [\d.]+ ms", log)


def test_a_bad_request_is_answered_and_the_server_lives(server: Server) -> None:
    image = tiny.picture(80, 80, seed=5)
    for request, message in (
        ({"script_keep": 0}, "script_keep: expected an int >= 1, got 0"),
        ({"script_kept": 3}, "script_kept: expected one of script_keep, script_keep_ratio"),
        ({"script_query": "image"}, "script_query: expected 'text' or None, got 'image'"),
    ):
        status, body = server.chat("w1", image, mm_processor_kwargs=request)
        assert status == 400, body
        assert message in json.loads(body)["error"]["message"]
    answer(server, "w1", image)
