"""The benchmark's own parts: it runs, its figures are sound, and a wrong result stops it."""

import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from bench import baselines, gates, report, runs, timing
from bench.cases import DTYPES, OPS, QUICK_ROWS, ROWS, Inputs, Row, make_case
from script_kernels import reference, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_sound(results: list[report.Result]) -> None:
    for result in results:
        times = (result.p20, result.median, result.p80)
        assert all(math.isfinite(value) and 0 < value < 60 for value in times)
        assert result.p20 <= result.median <= result.p80
        assert result.rounds >= 3
        assert result.flop_floor >= 0
        assert result.byte_floor > 0
        assert result.ratio > 0
        assert max(result.flop_floor, result.byte_floor) < 60


def test_quick_run(tmp_path: pathlib.Path) -> None:
    done = run_bench("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = report.read_csv(tmp_path / "ops-cpu-quick.csv")
    assert {(r.op, r.variant) for r in results} == {(op, name) for op in OPS for name in ("ours", "reference")}
    assert {(r.tokens, r.keep, r.batch) for r in results} == {(r.tokens, r.keep, r.batch) for r in QUICK_ROWS}
    assert {r.dtype for r in results} == {"float32", "bfloat16"}
    assert_sound(results)
    for fact in ("device:", "commit:", "torch:", "peaks with"):
        assert fact in done.stdout
    assert all(op in done.stdout for op in OPS)
    assert (tmp_path / "ops-cpu-quick.png").read_bytes().startswith(b"\x89PNG")


def test_quick_run_against_the_baselines(tmp_path: pathlib.Path) -> None:
    done = run_bench("--cpu", "--quick", "--no-compile", "--dtypes", "float32", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = report.read_csv(tmp_path / "baselines-cpu-quick.csv")
    assert {r.threads for r in results} == {1, 2}
    assert {r.variant for r in results if r.op == "qcsp"} == {"ours", "eager", "numpy", "bmm of S"}
    assert {r.op for r in results} == {"qcsp", "dpp_map", "gsp", "prune"}
    assert_sound(results)


def test_an_unknown_op_is_named() -> None:
    done = run_bench("--ops", "qcsp,nonsense")
    assert done.returncode == 2
    assert "got nonsense" in done.stderr


@pytest.fixture
def inputs() -> Inputs:
    return Inputs(Row(2, 60, 10), 48, torch.float32, torch.device("cpu"), "powerlaw")


def test_baselines_are_exact(inputs: Inputs) -> None:
    """What we compare with passes the same certificate."""
    kernel = testing.kernel64(inputs.tokens, inputs.relevance)
    testing.certify(kernel, baselines.qcsp(inputs.tokens, inputs.relevance, 10))
    picks = baselines.numpy_qcsp(inputs.tokens.numpy(), inputs.relevance.numpy(), 10)
    testing.certify(kernel, torch.from_numpy(picks))


def test_baselines_of_gsp_and_prune_follow_the_reference(inputs: Inputs) -> None:
    assert torch.equal(baselines.gsp(inputs.tokens, 45), reference.gsp(inputs.tokens, 45)[0])
    # The gaps between candidates are far above float32's rounding here, so there is one right answer.
    expected = reference.prune(inputs.tokens.double(), inputs.query.double(), 10, dtype=torch.float64)
    assert torch.equal(baselines.prune(inputs.tokens, inputs.query, 10, 20, 45), expected)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_does_not_pass_the_gate(op: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(op, inputs)
    case.gate()
    right = getattr(gates.script_kernels, op)

    def wrong(*arguments: object) -> object:
        """The first output read backwards along the tokens."""
        result = right(*arguments)
        return (result[0].flip(-1), *result[1:]) if isinstance(result, tuple) else result.flip(-1)

    monkeypatch.setattr(gates.script_kernels, op, wrong)
    with pytest.raises(AssertionError):
        case.gate()


def test_interleaving_tells_a_slow_variant_from_a_fast_one() -> None:
    order = []

    def variant(name: str, seconds: float) -> timing.Variant:
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = timing.interleave(
        {"fast": variant("fast", 3e-3), "slow": variant("slow", 9e-3)}, torch.device("cpu"), seconds=0.1
    )
    assert 3e-3 <= found["fast"].median < 9e-3 <= found["slow"].median
    rounds = found["fast"].rounds
    assert rounds == found["slow"].rounds
    measured = order[4:]  # two calls each come before
    assert len(measured) == 2 * rounds
    assert all({measured[i], measured[i + 1]} == {"fast", "slow"} for i in range(0, len(measured), 2))


def test_quantiles_are_measured_values() -> None:
    found = timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (found.p20, found.median, found.p80, found.rounds) == (2.0, 3.0, 5.0, 6)


def result(op: str, variant: str, row: Row, median: float, reference_median: float) -> report.Result:
    return report.Result(
        op,
        row.batch,
        row.tokens,
        row.keep,
        1024,
        "float32",
        1,
        variant,
        median,
        median,
        median,
        5,
        reference_median,
        1e-3,
        1e-4,
    )


def test_targets_are_judged() -> None:
    rows = [
        result("qcsp", "ours", row, 1.0, factor) for row, factor in zip(ROWS, (8.0, 5.9, 4.1, 9.0, 20.0), strict=True)
    ]
    assert [target.met for target in runs.speed_targets(rows, ROWS)] == [True, False, True, True, True]
    gsp = runs.speed_targets([result("gsp", "ours", ROWS[0], 1.6e-3, 1.0)], ROWS)
    assert [(target.met, round(target.measured, 3)) for target in gsp] == [(False, 1.6)]
    large = [result("prune", "ours", ROWS[4], 0.5, 2.5), result("prune", "bmm of S", ROWS[4], 1.0, 2.5)]
    assert [target.met for target in runs.speed_targets(large, ROWS)] == [True, True]


def test_csv_keeps_every_digit(tmp_path: pathlib.Path) -> None:
    written = [result("qcsp", "ours", ROWS[0], 1 / 3, 2 / 3)]
    report.write_csv(written, {"device": "a, b"}, tmp_path / "out" / "x.csv")
    assert report.read_csv(tmp_path / "out" / "x.csv") == written


def test_every_dtype_and_row_parses() -> None:
    assert [Row.parse(row.name) for row in ROWS] == list(ROWS)
    assert all(torch.empty(0, dtype=dtype).is_floating_point() for dtype in DTYPES.values())
