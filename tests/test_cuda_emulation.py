"""The CUDA sources executed on the CPU: the same `.cuh`, compiled by g++ against `cuda_emulation/cuda_runtime.h`.

Three builds run everything: plain (as fast as it gets), AddressSanitizer with UndefinedBehaviorSanitizer, and
ThreadSanitizer, to which every CUDA thread is a thread, so that a missing barrier is a data race whatever the schedule.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
EMULATION = HERE / "cuda_emulation"
KERNEL = HERE.parent / "csrc" / "cuda" / "mask_intersect.cuh"
SMALL_WINDOW = 2  # words, so 64 tokens

FORWARD, REVERSE, SHUFFLED = range(3)
ORDERS = (FORWARD, REVERSE, SHUFFLED)

SANITIZERS = {
    "plain": ([], []),
    "asan": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=emulated_shared"],
        ["-DEMULATION_ASAN"],
    ),
    "tsan": (["-fsanitize=thread"], ["-DEMULATION_TSAN"]),
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulation is built with g++ on Linux"
)


def compile_cpp(*arguments: str | pathlib.Path) -> None:
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Builds:
    """Compiles the programs at most once each."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def program(self, source: str, sanitizer: str, *, window: int | None = None, kernel: str | None = None) -> str:
        """The executable of `source`; `kernel`, if given, replaces the text of the kernel's file."""
        flags, engine_flags = SANITIZERS[sanitizer]
        engine = self.folder / f"engine_{sanitizer}.o"
        if not engine.exists():
            compile_cpp("-c", *engine_flags, "-I", EMULATION, EMULATION / "emulation.cpp", "-o", engine)
        program = self.folder / f"{source}_{sanitizer}_{window}_{hash(kernel):x}"
        if program.exists():
            return str(program)
        source_path = EMULATION / f"{source}.cpp"
        if kernel is not None:
            root = self.folder / f"root_{hash(kernel):x}"
            for path, text in ((source_path, source_path.read_text()), (KERNEL, kernel)):
                copy = root / path.relative_to(HERE.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text)
            source_path = root / source_path.relative_to(HERE.parent)
        define = [] if window is None else [f"-DSCRIPT_MASK_WINDOW_WORDS={window}"]
        compile_cpp(*flags, *define, "-I", EMULATION, source_path, engine, "-o", program)
        return str(program)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("cuda_emulation"))


# The emulation itself


def run_primitive(program: str, name: str, order: int, seed: int = 3) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, name, str(order), str(seed)], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_primitives_do_what_cuda_specifies(builds: Builds, sanitizer: str) -> None:
    program = builds.program("primitives", sanitizer)
    for name in ("shuffles", "votes", "barriers", "atomics", "warp_exchange", "refused_launch"):
        for order in ORDERS:
            done = run_primitive(program, name, order)
            assert (done.returncode, done.stdout) == (0, "ok\n"), (name, order, done.stderr)


FAULTS = {
    "unwritten_shared": "sum == kThreads does not hold",
    "divergent_barrier": "divergent barrier",
    "two_barriers": "divergent barrier",
    "ended_lane": "which has ended",
    "foreign_lane": "which its mask leaves out",
    "divergent_warp": "divergent warp",
    "deadlock": "deadlock",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_misused_primitive_is_reported_in_every_order(builds: Builds, fault: str) -> None:
    program = builds.program("primitives", "plain")
    for order in ORDERS:
        done = run_primitive(program, fault, order)
        assert done.returncode == 70, (order, done)
        assert FAULTS[fault] in done.stderr, (order, done)


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_syncwarp"])
def test_a_missing_barrier_is_caught_even_where_the_result_is_right(builds: Builds, fault: str) -> None:
    plain = [run_primitive(builds.program("primitives", "plain"), fault, SHUFFLED, seed) for seed in range(40)]
    wrong = [seed for seed, done in enumerate(plain) if done.returncode != 0]
    assert wrong, "no shuffled order gave the missing barrier away"
    for seed in range(3):
        done = run_primitive(builds.program("primitives", "tsan"), fault, SHUFFLED, seed)
        assert done.returncode != 0, "neither the result nor ThreadSanitizer gave the missing barrier away"


def test_a_hidden_race_is_a_race_to_thread_sanitizer(builds: Builds) -> None:
    done = run_primitive(builds.program("primitives", "tsan"), "hidden_race", FORWARD)
    assert done.stdout == "ok\n", "in this order the result is right"
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("fault", ["outside_shared", "outside_global"])
def test_an_access_out_of_bounds_is_caught(builds: Builds, fault: str) -> None:
    done = run_primitive(builds.program("primitives", "asan"), fault, FORWARD)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr


# mask_intersect


@dataclasses.dataclass
class Case:
    """One call: `ranking` (B, P) int64 and `mask` (B, N) bool may be views with any positive strides."""

    ranking: np.ndarray
    mask: np.ndarray
    keep: int
    order: int = FORWARD
    seed: int = 0

    def encode(self) -> bytes:
        batch, length = self.ranking.shape
        strides = [s // a.itemsize for a in (self.ranking, self.mask) for s in a.strides]
        header = [self.order, self.seed, batch, self.mask.shape[1], length, self.keep, *strides]
        parts = [np.array(header, np.int64).tobytes()]
        for view in (self.ranking, self.mask):
            last = sum((n - 1) * s // view.itemsize for n, s in zip(view.shape, view.strides, strict=True))
            count = last + 1 if view.size else 0
            storage = np.lib.stride_tricks.as_strided(view, (count,), (view.itemsize,))
            parts += [np.array([count], np.int64).tobytes(), storage.tobytes()]
        return b"".join(parts)

    def expected(self) -> np.ndarray:
        rows = [model(r, m, self.keep) for r, m in zip(self.ranking.tolist(), self.mask.tolist(), strict=True)]
        return np.array(rows, np.int64).reshape(len(rows), self.keep)


def model(ranking: list[int], mask: list[bool], keep: int) -> list[int]:
    """The rule of mask_intersect.cuh in plain Python, for valid rankings and others."""
    valid = [token for token in ranking if 0 <= token < len(mask)]
    members = [token for token in valid if mask[token]][:keep]
    others = [token for token in valid if not mask[token]][: keep - len(members)]
    chosen = set(members + others)
    lowest = (token for token in range(len(mask)) if token not in chosen)
    return sorted(chosen | {next(lowest) for _ in range(keep - len(chosen))})


def test_model_on_a_case_worked_by_hand() -> None:
    mask = [True, False, True, False, True]
    assert model([4, 3, 2, 1, 0], mask, 2) == [2, 4]
    assert model([4, 3, 1], mask, 2) == [3, 4]
    assert model([3, 1, 0], mask, 3) == [0, 1, 3]
    assert model([9, -1, 4, 4], mask, 3) == [0, 1, 4]


def execute(program: str, cases: list[Case]) -> None:
    done = subprocess.run([program], input=b"".join(case.encode() for case in cases), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    written = np.frombuffer(done.stdout, np.int64)
    assert written.size == sum(case.ranking.shape[0] * case.keep for case in cases)
    for case in cases:
        count = case.ranking.shape[0] * case.keep
        got, written = written[:count].reshape(-1, case.keep), written[count:]
        assert (got == case.expected()).all(), (case, got)


def make_case(
    rng: np.random.Generator, tokens: int, length: int, keep: int, *, batch: int, density: float, **kw
) -> Case:
    ranking = np.stack([rng.permutation(tokens)[:length] for _ in range(batch)]).astype(np.int64)
    return Case(ranking, rng.random((batch, tokens)) < density, keep, **kw)


def valid_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (31, 31, 7), (33, 32, 32), (64, 33, 5), (65, 65, 65), (100, 50, 25)]
    shapes += [(577, 128, 64), (577, 577, 1), (1300, 1281, 640)]
    cases = []
    for number, (tokens, length, keep) in enumerate(shapes):
        for density in (0.0, 0.1, 0.75, 1.0):
            batch = 3 if tokens < 200 else 1
            order = ORDERS[(number + len(cases)) % 3]
            cases.append(make_case(rng, tokens, length, keep, batch=batch, density=density, order=order, seed=number))
    return cases


def broken_cases() -> list[Case]:
    """Rankings that no caller should bring: entries out of range, and repeats."""
    rng = np.random.default_rng(1)
    wild = np.array([-1, -(2**63), 2**63 - 1, 2**40, -(2**31)], np.int64)
    cases = []
    for tokens, length, keep in ((40, 20, 10), (130, 70, 65), (5, 5, 5), (577, 577, 288)):
        for order in ORDERS:
            case = make_case(rng, tokens, length, keep, batch=3, density=0.5, order=order)
            outside = rng.random(case.ranking.shape) < 0.4
            case.ranking[outside] = rng.choice(np.append(wild, tokens), outside.sum())
            case.ranking[1] = rng.integers(0, max(1, tokens // 8), length)
            case.ranking[2] = tokens
            cases.append(case)
    return cases


def strided_cases() -> list[Case]:
    rng = np.random.default_rng(2)
    case = make_case(rng, 90, 60, 20, batch=4, density=0.3)
    wide_ranking = np.full((8, 180), -7, np.int64)
    wide_ranking[::2, 3:180:3][:, :59] = case.ranking[:, :59]
    every_third = Case(wide_ranking[::2, 3:180:3][:, :59], case.mask, 20)
    transposed = Case(case.ranking.T.copy().T, case.mask.T.copy().T, 20)
    shared_mask = Case(case.ranking, np.broadcast_to(case.mask[:1], case.mask.shape), 20)
    empty = Case(case.ranking[:0], case.mask[:0], 20)
    return [every_third, transposed, shared_mask, empty]


@pytest.mark.parametrize("window", [None, SMALL_WINDOW])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_mask_intersect_matches_the_model(builds: Builds, sanitizer: str, window: int | None) -> None:
    program = builds.program("mask_intersect", sanitizer, window=window)
    cases = valid_cases() + broken_cases() + strided_cases()
    execute(program, cases[::3] if sanitizer == "tsan" else cases)  # ThreadSanitizer takes seconds per thousand threads


def test_tokens_beyond_one_window_of_the_released_size(builds: Builds) -> None:
    rng = np.random.default_rng(3)
    cases = [make_case(rng, 150_001, 1500, 700, batch=1, density=d, order=SHUFFLED) for d in (0.3, 0.8)]
    cases[0].ranking[0, ::2] = -1
    execute(builds.program("mask_intersect", "plain"), cases)


def test_every_schedule_gives_the_same_answer(builds: Builds) -> None:
    rng = np.random.default_rng(4)
    base = make_case(rng, 400, 300, 120, batch=2, density=0.3)
    cases = [dataclasses.replace(base, order=SHUFFLED, seed=seed) for seed in range(20)]
    execute(builds.program("mask_intersect", "plain", window=SMALL_WINDOW), cases)


# Each fault planted in a copy of the kernel must be caught, else the tests above prove nothing.
BARRIERS = KERNEL.read_text().count("__syncthreads();")


def without_barrier(number: int) -> str:
    parts = KERNEL.read_text().split("__syncthreads();")
    return "__syncthreads();".join(parts[: number + 1]) + "__syncthreads();".join(["", *parts[number + 1 :]])[16:]


def planted(old: str, new: str) -> str:
    text = KERNEL.read_text()
    assert text.count(old) == 1, old
    return text.replace(old, new)


def caught_by(builds: Builds, sanitizer: str, kernel: str) -> str:
    program = builds.program("mask_intersect", sanitizer, window=SMALL_WINDOW, kernel=kernel)
    rng = np.random.default_rng(5)
    # More ranking entries than threads, fewer members than wanted: every scan and every window is run more than once.
    cases = [make_case(rng, 1100, 1060, 300, batch=1, density=0.2, order=order) for order in ORDERS]
    stdin = b"".join(case.encode() for case in cases)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], input=stdin, env=environment, check=False, capture_output=True)
    return done.stderr.decode() if done.returncode else ""


@pytest.mark.parametrize("number", range(BARRIERS))
def test_each_barrier_of_mask_intersect_is_needed(builds: Builds, number: int) -> None:
    kernel = without_barrier(number)
    assert kernel.count("__syncthreads();") == BARRIERS - 1
    assert "ThreadSanitizer: data race" in caught_by(builds, "tsan", kernel)


def test_one_buffer_of_warp_totals_would_be_a_race(builds: Builds) -> None:
    kernel = planted("    parity_ ^= 1;\n", "")
    assert "ThreadSanitizer: data race" in caught_by(builds, "tsan", kernel)


def test_an_unchecked_index_would_be_caught(builds: Builds) -> None:
    kernel = planted("if (token < 0 || token >= args.tokens) return Entry::kInvalid;", "")
    program = builds.program("mask_intersect", "asan", kernel=kernel)
    case = broken_cases()[0]
    done = subprocess.run([program], input=case.encode(), check=False, capture_output=True)
    assert done.returncode != 0
    assert b"AddressSanitizer" in done.stderr
