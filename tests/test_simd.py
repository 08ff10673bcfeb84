"""Every SIMD level this CPU has passes the tests of the ops, and the environment variable chooses it."""

import os
import pathlib
import subprocess
import sys

import pytest
from simd_levels import levels_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the kernel calls the features that a level needs.
FEATURES: dict[str, set[str]] = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "neon_bf16": {"bf16"},
}
LEVELS = levels_of()
TESTS = ["test_relevance.py", "test_bipartite_match.py", "test_gsp.py", "test_dpp.py", "test_differential.py"]
TESTS += ["test_rankings.py"]


def cpu_flags() -> set[str]:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


HERE = [level for level in LEVELS if FEATURES[level] <= cpu_flags()]


def run(*command: str, level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SCRIPT_KERNELS_SIMD"}
    if level is not None:
        environment["SCRIPT_KERNELS_SIMD"] = level
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )


SHOW = "from script_kernels import _core; print(_core.build_info()['simd'])"


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_the_variable_lowers_the_level_and_never_raises_it(level: str | None) -> None:
    allowed = LEVELS[: LEVELS.index(level or LEVELS[-1]) + 1]
    wanted = [name for name in allowed if name in HERE][-1]
    assert run("-c", SHOW, level=level).stdout.strip() == wanted


def test_an_unknown_level_is_an_error() -> None:
    result = run("-c", "import torch, script_kernels; script_kernels.prune(torch.ones(1, 4, 2), None, 2)", level="sse9")
    assert result.returncode != 0
    assert f"SCRIPT_KERNELS_SIMD: expected {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got sse9" in result.stderr


@pytest.mark.parametrize("level", HERE[:-1])  # the best one is what all other tests run on
def test_the_ops_pass_their_tests(level: str) -> None:
    tests = [f"tests/{name}" for name in TESTS]
    result = run(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not reference and not long_images and not oracles and not union",
        *tests,
        level=level,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
