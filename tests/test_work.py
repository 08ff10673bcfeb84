"""No op does more than its arithmetic asks for, whatever the values: counted in the inner loops, not in seconds."""

import os
import pathlib
import subprocess

import pytest
from fuzz_build import build

from bench import least_work
from bench.least_work import Work

# Counted multiply-adds, as a share of the least work in bench.least_work: whole panels, pools and rows that are
# taken again where products are not kept.
MOST = 1.6


@pytest.fixture(scope="module")
def program() -> pathlib.Path:
    return build("count", "count", "-O2")


def count(program: pathlib.Path, *arguments: object) -> tuple[int, int]:
    environment = {key: value for key, value in os.environ.items() if key != "SCRIPT_KERNELS_SIMD"}
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    multiply_adds, columns = map(int, done.stdout.split())
    return multiply_adds, columns


def bound(work: Work, n: int) -> float:
    """Multiply-adds, with room for a few pools of candidates and for the rows' statistics."""
    return MOST * work.flops / 2 + 64 * 64 * 64 + 100 * n


CASES = [
    ("query_relevance", 20000, 32, 1, 1, least_work.query_relevance_work(1, 20000, 32, 2, 4)),
    ("bipartite_match", 20000, 8, 1, 1, least_work.bipartite_match_work(1, 20000, 8, 4)),
    ("gsp", 20000, 4, 10000, 1, least_work.gsp_work(1, 20000, 4, 10000, 1, 4)),
    ("gsp", 4096, 8, 64, 100, least_work.gsp_work(1, 4096, 8, 64, 100, 4)),
    ("gsp", 6000, 4, 60, 100, least_work.gsp_work(1, 6000, 4, 60, 100, 4)),
    ("qcsp", 20000, 128, 96, 1, least_work.qcsp_work(1, 20000, 128, 96, 4)),
    ("qcsp", 2000, 256, 400, 1, least_work.qcsp_work(1, 2000, 256, 400, 4)),
    ("dpp_map", 20000, 1, 200, 1, least_work.dpp_map_work(1, 20000, 200)),
    ("prune", 6000, 16, 200, 5, least_work.prune_work(1, 6000, 16, 200, 4, Q=2, rounds=5)),
    ("prune", 20000, 16, 200, 1, least_work.prune_work(1, 20000, 16, 200, 4, Q=2)),
]


@pytest.mark.parametrize("kind", ["spread", "near", "alike"])
@pytest.mark.parametrize(("op", "n", "width", "k", "rounds", "work"), CASES)
def test_no_more_than_the_arithmetic(
    program: pathlib.Path, op: str, n: int, width: int, k: int, rounds: int, work: Work, kind: str
) -> None:
    multiply_adds, columns = count(program, op, n, width, k, rounds, kind)
    assert 0 < multiply_adds <= bound(work, n)
    # What passes over columns costs no more than the arithmetic either.
    assert columns <= bound(work, n)


@pytest.mark.parametrize("kind", ["spread", "near", "alike", "apart", "pairs"])
@pytest.mark.parametrize(("n", "width", "k"), [(600, 32, 60), (2880, 128, 320)])
def test_no_more_for_the_nearest_pick(program: pathlib.Path, n: int, width: int, k: int, kind: str) -> None:
    """max_min's first pick needs the nearest neighbour of many tokens: a triangle of S at most."""
    work = least_work.nearest_work(1, n, width, k, 4)
    multiply_adds, columns = count(program, "mmr", n, width, k, 1, kind)
    assert 0 < max(multiply_adds, columns) <= bound(work, n)
    multiply_adds, columns = count(program, "max_min", n, width, k, 1, kind)
    assert 0 < max(multiply_adds, columns) <= bound(work, n) + n * n * width / 2


def test_a_lookalike_is_worth_many_tokens(program: pathlib.Path) -> None:
    """In clusters, max_min's first pick takes a small part of the triangle: tokens meet their like first."""
    n, width, k = 2880, 128, 320
    work = least_work.nearest_work(1, n, width, k, 4)
    multiply_adds, _ = count(program, "max_min", n, width, k, 1, "clusters")
    assert 0 < multiply_adds <= work.flops / 2 + n * n * width / 14


def test_work_too_much_is_seen(program: pathlib.Path) -> None:
    """The work of 100 rounds is more than the bound of one."""
    one = least_work.gsp_work(1, 6000, 4, 3000, 1, 4)
    assert count(program, "gsp", 6000, 4, 60, 100, "spread")[0] > bound(one, 6000)
