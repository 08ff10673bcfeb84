"""The torch-free C++ cores as a program: under AddressSanitizer and UBSan, and on AArch64 (by QEMU where present)."""

import os
import pathlib
import platform
import shutil
import subprocess

import numpy as np
import pytest
import torch

from script_kernels import reference, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
X86 = platform.machine() in ("x86_64", "AMD64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 1), (63, 7, 20, 40), (130, 33, 70, 65), (321, 18, 60, 161)]


def build(folder: pathlib.Path, compiler: str, flags: list[str], levels: list[str]) -> pathlib.Path:
    """Compiles the program with the same split of flags as CMakeLists.txt."""
    common = [compiler, "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    sources = {ROOT / "tests/cores/main.cpp": [], ROOT / "csrc/cpu/simd.cpp": []}
    # GCC notes that vectors wider than the target's are passed differently by other compilers; none leaves its file.
    sources |= {
        ROOT / f"csrc/cpu/simd_{level}.cpp": ["-ffp-contract=fast", "-Wno-psabi", *LEVELS[level]] for level in levels
    }
    objects = []
    for source, own in sources.items():
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*common, *own, "-c", str(source), "-o", str(objects[-1])], check=True, timeout=300)
    program = folder / "cores"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True, timeout=300)
    return program


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
    qcsp, dpp, intersect, restrict, mask = output.split([k, k, k, k, n])
    testing.certify(testing.kernel64(tokens, relevance), qcsp[None])
    testing.certify(testing.kernel64(tokens, relevance), dpp[None])
    for kept in (intersect, restrict):
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
    return build(tmp_path_factory.mktemp("sanitized"), compiler, flags, list(LEVELS) if X86 else ["baseline"])


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", list(LEVELS) if X86 else ["baseline"])
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
    return build(tmp_path_factory.mktemp("aarch64"), compiler, ["-O3", "-static"], ["baseline"])


def test_compiles_for_aarch64(aarch64: pathlib.Path) -> None:
    assert aarch64.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_on_aarch64(aarch64: pathlib.Path, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64 (Debian: apt-get install qemu-user)")
    check([emulator, str(aarch64)], *shape, dtype, "powerlaw")
