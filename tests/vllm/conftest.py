"""Engines that are shared: each scenario runs once a session, in a process of its own, and tests read what it tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FAMILIES = ("llava", "llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLOSE = 1e-4  # of log-probabilities, in float32


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of log-probabilities, infinite where the tokens differ."""
    if a["tokens"] != b["tokens"]:
        return float("inf")
    return max(abs(x - y) for x, y in zip(a["scores"], b["scores"], strict=True))


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SCRIPT_", "VLLM_"))}
    # One thread: on models this small a second one mostly waits, in busy loops.
    return {"OMP_NUM_THREADS": "1", **kept, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **extra}


@pytest.fixture(scope="session")
def tell(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    @cache
    def run(scenario: str, family: str, **environment: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"{scenario}-{family}")
        command = [sys.executable, str(HERE / "scenarios.py"), scenario, family, str(folder / "model")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=900, env=clean_environment(**environment)
        )
        (folder / "stderr").write_text(done.stderr)
        assert done.returncode == 0, done.stderr[-4000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
        told: dict[str, Any] = json.loads(line.removeprefix("TOLD "))
        return told

    return run


@pytest.fixture(scope="session", params=FAMILIES)
def told(request: pytest.FixtureRequest, tell: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return {"family": request.param, **tell("pruned", request.param)}
