"""A configuration that cannot be served ends at start-up, by the message that says why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import server
import tiny
from conftest import HERE, clean_environment

MESSAGES = {
    "no_tokens": "script_keep: expected an int >= 1, got 0",
    "both_budgets": "script_keep: expected either script_keep or script_keep_ratio, got 4 and 0.5",
    "no_share": "script_keep_ratio: expected a number in (0, 1], got 1.5",
    "unknown": "script_gamma2: expected one of script_keep, script_keep_ratio, script_query",
    "bad_option": "script_gsp_drop: expected",
    "family": "script_keep: expected a model of one of LlavaForConditionalGeneration",
    "no_method": "script_method: expected one of script, focus, cdpruner,",
    "bad_method_option": "script_power: expected 0 <= power <= 64, got -1",
    "unasked_relevance": "script_method: expected one that works without script_query=text, got 'relevance'",
    "asked_encoder": "script_query: expected None where the encoder runs without the language model, got 'text'",
    "old_engine": "script_keep: expected vLLM 0.31 or newer, got 0.30.2",
    "own_pruning": "script_keep: expected PrunedQwen2_5_VL without the engine's own pruning (video_pruning_rate)",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    command = [sys.executable, str(HERE / "startup.py"), str(tmp_path_factory.mktemp("startup"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=clean_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
    told: dict[str, str] = json.loads(line.removeprefix("TOLD "))
    return told


@pytest.mark.parametrize("case", MESSAGES)
def test_refused(said: dict[str, str], case: str) -> None:
    assert MESSAGES[case] in said[case]


def test_graphs_that_replay_a_prefill_are_refused(said: dict[str, str]) -> None:
    told = {name.removeprefix("graphs_"): text for name, text in said.items() if name.startswith("graphs_")}
    assert "cudagraph_mode FULL, where a replayed prefill" in told.pop("FULL")
    assert {"NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"} <= set(told)
    assert set(told.values()) == {"started"}


def test_the_refusal_of_a_family_names_it(said: dict[str, str]) -> None:
    assert said["family"].endswith("got LlavaOnevisionForConditionalGeneration")


def test_a_server_with_a_bad_environment_does_not_start(tmp_path: Path) -> None:
    tiny.save("llava", tmp_path / "model")
    command = server.command(tmp_path / "model", server.free_port())
    environment = clean_environment(SCRIPT_KEEP="many")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0
    assert "script_keep: expected an int >= 1, got 'many'" in done.stderr
