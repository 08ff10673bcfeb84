"""examples/ray_data.py with real Ray on vLLM's CPU build: the answers of one process, and none lost with a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from conftest import HERE, clean_environment

IMAGES, BATCH, KEEP, TOKENS, QUESTION = 48, 4, 0.4, 12, "w1 w2 w3"
ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32, "seed": 0,
    "kv_cache_memory_bytes": 64 << 20, "limit_mm_per_prompt": {"image": 1}, "max_num_seqs": BATCH,
}  # fmt: skip


def environment() -> dict[str, str]:
    return clean_environment(RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bulk")
    tiny.save("llava", root / "model")
    (root / "images").mkdir()
    for i in range(IMAGES):
        tiny.picture(100, 60, seed=i).save(root / "images" / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[Any]]:
    command = [sys.executable, str(HERE / "bulk" / "single.py"), str(folder / "model"), str(folder / "images")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
    told: dict[str, list[Any]] = json.loads(line.removeprefix("TOLD "))
    return told


def start(folder: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(HERE / "bulk" / "local.py"), "--model", str(folder / "model"),
        "--images", str(folder / "images"), "--out", str(out), "--question", QUESTION, "--keep", str(KEEP),
        "--tokens", str(TOKENS), "--workers", str(workers), "--batch", str(BATCH), "--cpu", "--engine",
        json.dumps(ENGINE),
    ]  # fmt: skip
    with (folder / f"{out.name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment())


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("*.json")) for line in path.read_text().splitlines()]


def check(folder: Path, process: subprocess.Popen[str], out: Path, single: dict[str, list[Any]]) -> None:
    assert process.wait(1500) == 0, (folder / f"{out.name}.log").read_text()[-4000:]
    told = rows(out)
    assert len(told) == len(single) == IMAGES
    assert {Path(row["path"]).name: [row["answer"], row["prompt_tokens"]] for row in told} == single


def test_the_answers_are_those_of_one_process(folder: Path, single: dict[str, list[Any]], tmp_path: Path) -> None:
    check(folder, start(folder, tmp_path / "two", workers=2), tmp_path / "two", single)
    lengths = {length for _, length in single.values()}
    assert lengths == {single["000.png"][1]}
    assert len({text for text, _ in single.values()}) > IMAGES // 2, "the images are told apart"


def test_no_row_is_lost_with_a_worker(folder: Path, single: dict[str, list[Any]], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(folder, out, workers=1)
    killed = None
    while killed is None and process.poll() is None:
        # Once a batch is answered, the worker that holds the engine goes.
        if list(out.glob("*.json")):
            for child in psutil.Process(process.pid).children(recursive=True) + list(psutil.process_iter()):
                if "vLLMEngineStage" in " ".join(child.cmdline()[:1]):
                    killed = child.pid
                    child.kill()
                    break
        time.sleep(0.05)
    assert killed is not None, "all was answered before a worker could be killed"
    assert len(rows(out)) < IMAGES
    check(folder, process, out, single)
