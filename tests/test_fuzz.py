"""The torch-free cores on random bytes: values, strides, sizes and dtypes of any kind, on every SIMD level, under
sanitizers and against an oracle in double (tests/fuzz). `make fuzz` looks for new inputs; here are a few at random, and
those that a fuzzer has found to reach new code."""

import os
import pathlib
import subprocess

import pytest
from fuzz_build import ROOT, build
from op_cases import OPS

ADDRESS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
THREAD = "-O1 -fsanitize=thread"
CORPUS = ROOT / "tests/fuzz/corpus"


def run(program: pathlib.Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]

    def once(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})

    done = once(command)
    if "unexpected memory mapping" in done.stderr:  # older sanitizers, where the kernel spreads addresses further
        done = once(["setarch", "-R", *command])
    return done


@pytest.mark.parametrize("op", OPS)
def test_random_inputs(op: str) -> None:
    """Their number is what counts: a call that ends the program early would print none."""
    program = build("random", "check", ADDRESS) / f"{op}.random"
    done = run(program, 400, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "400\n"


@pytest.mark.parametrize("op", OPS)
def test_found_inputs(op: str) -> None:
    corpus = CORPUS / f"{op}.txt"
    inputs = corpus.read_text().split()
    assert len(inputs) > 100
    done = run(build("random", "check", ADDRESS) / f"{op}.random", 0, corpus)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{len(inputs)}\n"


@pytest.mark.parametrize("threads", ["2", "8"])
@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_race(op: str, threads: str) -> None:
    """Every loop that may be split is split. `make tsan` runs many more."""
    done = run(build("random", "tsan", THREAD) / f"{op}.random", 25, 2, FUZZ_THREADS=threads)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "25\n"


def test_every_allocation_and_thread_may_fail() -> None:
    done = run(build("faults", "check", ADDRESS))
    assert done.returncode == 0, done.stderr[-3000:]
    tried = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert set(tried) == {*OPS, "blocks"}
    assert min(tried.values()) > 5, tried


@pytest.mark.parametrize(("fault", "seen"), [("leak", "detected memory leaks"), ("wrong", "the same bits after")])
def test_a_planted_fault_is_seen(fault: str, seen: str) -> None:
    done = run(build("faults", "check", ADDRESS), fault)
    assert done.returncode != 0
    assert seen in done.stderr
