"""The torch-free C++ cores as a program: under AddressSanitizer and UBSan, and on AArch64 (by QEMU where present)."""

import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import torch
from simd_levels import build_cores, levels_of

from script_kernels import reference, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAIN = ROOT / "tests/cores/main.cpp"
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 1), (63, 7, 20, 40), (130, 33, 70, 65), (321, 18, 60, 161)]


def check(command: list[str], n: int, width: int, k: int, keep: int, dtype: torch.dtype, kind: str, **env: str) -> None:
    """Runs the program on one case and holds its output to the certificate and to the counts."""
    tokens = testing.make_tokens(kind, 1, n, width, dtype=dtype, seed=n)
    relevance = torch.rand(1, n, generator=torch.Generator().manual_seed(n)) * 0.9 + 0.1
    words = tokens.view(torch.int16).numpy() if dtype != torch.float32 else tokens.numpy()
    header = np.array([n, width, k, keep, CODES[dtype]], dtype=np.int64)
    result = subprocess.run(
        command,
        input=header.tobytes() + words.tobytes() + relevance.numpy().tobytes(),
        capture_output=True,
        timeout=300,
        env={**os.environ, **env},
    )
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    output = torch.from_numpy(np.frombuffer(result.stdout, dtype=np.int64).copy())
    qcsp, dpp, far, mmr, intersect, restrict, union, mask = output.split([k, k, k, k, k, k, k, n])
    testing.certify(testing.kernel64(tokens, relevance), qcsp[None])
    testing.certify(testing.kernel64(tokens, relevance), dpp[None])
    testing.certify_max_min(tokens, relevance, far[None])
    testing.certify_mmr(tokens, relevance, mmr[None])
    for kept in (intersect, restrict, union):
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == k
        assert 0 <= int(kept[0]) <= int(kept[-1]) < n
    options = {"gsp_drop": 0.5 if n > 2 else 0.0, "rounds": 2}
    mask64, _ = reference.gsp(tokens, n - int(options["gsp_drop"] * n), rounds=2, dtype=torch.float64)
    survivors = mask64[0].nonzero().flatten()
    if k <= len(survivors):
        assert bool(mask64[0, restrict].all())
    assert int(mask.sum()) == keep


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return build_cores(tmp_path_factory.mktemp("sanitized"), MAIN, compiler, flags)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", levels_of())
def test_sanitizers(sanitized: pathlib.Path, level: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check([str(sanitized)], *shape, dtype, "powerlaw", SCRIPT_KERNELS_SIMD=level)


def test_a_planted_overrun_is_caught(sanitized: pathlib.Path) -> None:
    """The program is told of one token more than there is; the sanitizer has to see the read."""
    header = np.array([64, 16, 8, 32, 0], dtype=np.int64)
    data = header.tobytes() + np.ones(64 * 16 + 64, np.float32).tobytes()
    result = subprocess.run([str(sanitized), "overrun"], input=data, capture_output=True, timeout=60)
    assert result.returncode != 0
    assert b"heap-buffer-overflow" in result.stderr


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)")
    return build_cores(tmp_path_factory.mktemp("aarch64"), MAIN, compiler, ["-O3", "-static"], "aarch64")


def test_compiles_for_aarch64(aarch64: pathlib.Path) -> None:
    assert aarch64.read_bytes()[:4] == b"\x7fELF"


def emulator() -> str:
    found = shutil.which("qemu-aarch64")
    if found is None:
        pytest.skip("no qemu-aarch64 (Debian: apt-get install qemu-user)")
    return found


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", levels_of("aarch64"))
def test_runs_on_aarch64(
    aarch64: pathlib.Path, level: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check([emulator(), "-cpu", "max", str(aarch64)], *shape, dtype, "powerlaw", SCRIPT_KERNELS_SIMD=level)


def test_the_level_with_bf16_products_is_used_where_the_processor_has_them(aarch64: pathlib.Path) -> None:
    """QEMU's cortex-a57 has none, its largest CPU has; a level that is not there is not called."""
    for cpu, name in (("cortex-a57", "baseline"), ("max", "neon_bf16")):
        result = subprocess.run([emulator(), "-cpu", cpu, str(aarch64), "level"], capture_output=True, timeout=60)
        assert result.stdout.decode() == name


@pytest.mark.parametrize(
    ("compiler", "flags"), [("g++", ["-O3"]), ("clang++", ["-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all"])]
)
def test_products_have_the_same_bits_wherever_they_stand(
    compiler: str, flags: list[str], tmp_path: pathlib.Path
) -> None:
    """With optimisation, and with the checks between operations that keep a compiler from fusing them."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    program = build_cores(tmp_path, ROOT / "tests/cores/products.cpp", compiler, flags)
    for level in levels_of():
        done = subprocess.run(
            [program], capture_output=True, text=True, timeout=300, env={**os.environ, "SCRIPT_KERNELS_SIMD": level}
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_loops_are_split_where_that_pays(tmp_path: pathlib.Path) -> None:
    """In simulated time: share of the time that one thread would take, and share of the loops that were split."""
    program = build_cores(tmp_path, ROOT / "tests/cores/threads.cpp", os.environ.get("CXX", "g++"), ["-O1"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    found = {
        name: (float(time), float(split))
        for name, time, split in (line.rsplit(" ", 2) for line in done.stdout.splitlines())
    }
    assert found["failures"] == (300, 300)
    assert found["quiet"] == (pytest.approx(0.55, abs=0.001), 1.0)
    assert found["hiccups"][0] < 0.7
    assert found["busy"][0] < 1.01
    assert found["shared"][0] < 1.05
    assert found["long loops"][0] < 1.05
    assert found["stopped"][1] > 0.99
    assert found["a little slower"][0] < 1.005
    assert found["halves"][0] < 1.02
    assert found["short"][0] < 0.65
    assert found["short"][1] > 0.95
    # Within two seconds of the thirty it is back.
    assert found["then quiet"][0] == pytest.approx((30 + 30) / (30 + 30 / 0.55), rel=0.03)
