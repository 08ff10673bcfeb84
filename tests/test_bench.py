"""The benchmark's own parts: it runs, its figures are sound, and a wrong result stops it."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch

from bench import baselines, cases, gates, model, peak, report, run, targets, threads, timing
from bench.cases import DTYPES, OPS, QUICK_ROWS, ROWS, Inputs, Row, make_case
from script_kernels import _core, reference, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIMD = _core.build_info()["simd"]


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
    for fact in ("device:", "commit:", "torch:", "peaks with", "Floors: "):
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


def test_commands() -> None:
    done = run_bench("run", "--ops", "qcsp,nonsense")
    assert done.returncode == 2
    assert "got nonsense" in done.stderr
    recorded = str(ROOT / "tests" / "recorded" / "first_run.csv")
    done = run_bench("compare", recorded, recorded)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0 slower, 0 missing, 0 faster, beyond noise")
    assert "--preset" in run_bench("prefill", "--help").stdout
    done = run_bench("released")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(testing.KINDS)


@pytest.fixture
def inputs() -> Inputs:
    return Inputs(Row(2, 60, 10), 48, torch.float32, torch.device("cpu"), "powerlaw")


def test_baselines_are_exact(inputs: Inputs) -> None:
    """What we compare with passes the same certificate."""
    kernel = testing.kernel64(inputs.tokens, inputs.relevance)
    testing.certify(kernel, baselines.qcsp(inputs.tokens, inputs.relevance, 10))
    picks = baselines.numpy_qcsp(inputs.tokens.numpy(), inputs.relevance.numpy(), 10)
    testing.certify(kernel, torch.from_numpy(picks))
    arguments = (inputs.tokens, inputs.relevance)
    testing.certify_max_min(*arguments, baselines.max_min(*arguments, 10))
    testing.certify_mmr(*arguments, baselines.mmr(*arguments, 10))


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


def result(op: str, variant: str, row: Row, median: float, width: int = 1024, dtype: str = "float32") -> report.Result:
    times = (median, median, median)
    case = (row.batch, row.tokens, row.keep, width, dtype, 1)
    return report.Result(op, *case, variant, *times, 5, 1.0, 1e-3, 1e-4, "a product, a copy")


def test_targets_are_judged() -> None:
    rows = [result("qcsp", "ours", row, 1.0) for row in ROWS]
    rows += [result("qcsp", "eager", row, factor) for row, factor in zip(ROWS, (8.0, 5.9, 4.1, 9.0, 20.0), strict=True)]
    assert [target.met for target in targets.judge(rows)] == [True, False, True, True, True]
    gsp = targets.judge([result("gsp", "ours", ROWS[0], 1.6e-3)])
    assert [(target.met, round(target.measured, 3)) for target in gsp] == [(False, 1.6)]
    large = [result("prune", name, ROWS[4], time) for name, time in (("ours", 0.5), ("eager", 2.5), ("bmm of S", 1.0))]
    assert [target.met for target in targets.judge(large)] == [True, True]
    growth, share = targets.memory_targets("gsp", (1000, 10), (4000, 61))
    assert (growth.met, share.met) == (False, True)


def test_a_gpus_targets_are_judged_by_its_graphs() -> None:
    wide = {"width": 4096, "dtype": "bfloat16"}
    rows = [
        result("dpp_map", "ours graph", Row(1, 576, 64), 60e-6),
        result("dpp_map", "eager graph", Row(1, 576, 64), 479e-6),
        result("dpp_map", "ours graph", Row(8, 576, 64), 61e-6),
        result("prune", "ours graph", Row(1, 576, 64), 139e-6, **wide),
        result("prune", "ours graph", Row(1, 576, 64), 1e-6),
        result("prune", "ours graph", Row(5, 576, 32), 250e-6, **wide),
        result("prune", "ours", Row(1, 576, 64), 100e-6, **wide),
        result("prune", "eager", Row(1, 576, 64), 4000e-6, **wide),
    ]
    assert {target.what: target.met for target in targets.judge(rows, gpu=True)} == {
        "H100: dpp_map 576/64/B1 D1024 float32 in a graph: us": True,
        "H100: dpp_map 576/64/B8 D1024 float32 in a graph: us": False,
        "H100: prune 576/64/B1 D4096 bfloat16 in a graph: us": True,
        "H100: prune 576/32/B5 D4096 bfloat16 in a graph: us": False,
        "H100: dpp_map 576/64/B1 D1024, ours graph: times faster than eager graph": False,
        "H100: prune 576/64/B1 D4096, ours: times faster than eager": True,
    }


def plan(*arguments: str) -> list[tuple[str, Row, int, str]]:
    return list(run.plan(run.parse_arguments(list(arguments))))


def test_the_plan_holds_every_case_once() -> None:
    for arguments in ((), ("--cpu",), ("--device", "cuda", "--dtypes", "bfloat16")):
        found = plan(*arguments)
        assert len(set(found)) == len(found)
        assert {op for op, *_ in found} == set(run.CPU_OPS if "--cpu" in arguments else OPS)
        assert {dtype for op, *_, dtype in found if op == "dpp_map"} == {"float32"}
    gpu = plan("--device", "cuda", "--dtypes", "bfloat16")
    assert {row for op, row, *_ in gpu if op == "prune"} == set(cases.GPU_ROWS)
    judged = {(op, row, width, dtype) for op, row, width, dtype in targets.MICROSECONDS}
    assert judged <= set(gpu), "a target without a case"
    first_stage = next(place for place, case in enumerate(gpu) if case[0] not in ("prune", "dpp_map"))
    assert {case[0] for case in gpu[first_stage:]}.isdisjoint({"prune", "dpp_map"})
    assert {(op, 1024, dtype) for op, dtype in targets.FASTER} <= {(op, w, dtype) for op, _, w, dtype in plan("--cpu")}


def test_what_a_cut_or_failed_run_leaves(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    honest = run.measure

    def measure(case: cases.Case, *rest: object) -> list[report.Result]:
        if case.op == "gsp":
            raise AssertionError("a wrong result")
        if case.op == "bipartite_match":
            raise KeyboardInterrupt
        return honest(case, *rest)

    monkeypatch.setattr(run, "measure", measure)
    arguments = ["--quick", "--rows", "40/6/B1", "--dtypes", "float32", "--out", str(tmp_path)]
    assert run.main([*arguments, "--ops", "qcsp,gsp,dpp_map"]) == 1
    assert {row.op for row in report.read_csv(tmp_path / "ops-cpu-quick.csv")} == {"qcsp", "dpp_map"}
    assert "FAILED gsp 40/6/B1 D32 float32" in capfd.readouterr().err
    assert run.main([*arguments, "--ops", "qcsp,bipartite_match,dpp_map"]) == 130
    assert {row.op for row in report.read_csv(tmp_path / "ops-cpu-quick.csv")} == {"qcsp"}
    assert "stopped: KeyboardInterrupt" in capfd.readouterr().err


def test_without_matplotlib_the_rows_are_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--quick", "--rows", "40/6/B1", "--ops", "qcsp", "--dtypes", "float32", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ops-cpu-quick.csv"]
    assert "no plot" in capfd.readouterr().out


def test_floors_say_what_they_stand_on() -> None:
    peaks = timing.measure_peaks(torch.device("cpu"), size=64, copy_bytes=1 << 20)
    said = peaks.origin(torch.float32)
    product = r"(torch.mm|oneDNN linear|bipartite_match) of 64|multiply-adds alone: \d+ flop x [\d.]+ x [\d.]+ GHz"
    assert re.fullmatch(rf"float32 ({product}) \d+ Gflop/s, copy of 1 MiB [\d.]+ GB/s", said)
    assert peaks.origin(torch.float16) == said, "the CPU widens fp16"
    assert re.match(rf"bfloat16 ({product}) \d+ Gflop/s", peaks.origin(torch.bfloat16))
    flops, traffic = peaks.floor(2e9, 1e9, torch.float32)
    assert f"{2 / flops:.0f} Gflop/s" in said
    assert f"{1 / traffic:.1f} GB/s" in said
    assert "threads 1: a product, a copy" in report.table([result("qcsp", "ours", ROWS[0], 1.0)])


@pytest.mark.skipif(peak.measure(SIMD, "float32") is None, reason="no loop of multiply-adds for this processor")
def test_no_product_beats_multiply_adds_alone() -> None:
    """And they are no fantasy: our product, with all that bipartite_match does besides, comes near."""
    tokens = torch.randn(1024, 512)
    (ours, _), (alone, name) = timing.own_rates(tokens, timing.Clock(tokens.device))
    alone /= torch.get_num_threads()
    assert 0.2 * alone < ours / torch.get_num_threads() < 1.1 * alone
    units = float(re.search(r"flop x ([\d.]+) x", name)[1])
    assert 0.4 < units < 2.3, "a core has one or two such units, or half of one"


def test_without_a_query(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--no-query", "--rows", "40/6/B1", "--ops", "prune,qcsp,prune_varlen"]
    assert run.main([*arguments, "--dtypes", "float32", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "ops-cpu-quick-no-query.csv").open()))
    assert {row["op"] for row in rows} == {"prune", "qcsp", "prune_varlen"}
    assert {row["inputs"] for row in rows} == {"powerlaw, no query"}
    inputs = Inputs(Row(1, 40, 6), 32, torch.float32, torch.device("cpu"), "powerlaw", asks=False)
    case = make_case("prune", inputs)
    assert case.arguments[1] is None
    case.gate()
    assert case.eager()().shape == (1, 6)
    slow = dataclasses.replace(result("prune", "ours", Row(1, 2880, 320), 1.0), flop_floor=0.5)
    assert [target.met for target in targets.judge_no_query([slow])] == [False]


def test_the_baselines_select_what_the_ops_select(inputs: Inputs) -> None:
    """On clear-cut inputs, so that a baseline does not measure something else than ours."""
    for op in ("mask_intersect", "prune", "dpp_map", "qcsp"):
        case = make_case(op, inputs)
        ours = case.ours()
        assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, case.eager()()), op
    for op in ("bipartite_match", "query_relevance"):
        case = make_case(op, inputs)
        ours, eager = case.ours(), case.eager()()
        pairs = zip(ours, eager, strict=True) if isinstance(ours, tuple) else [(ours, eager)]
        for one, other in pairs:
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-5)
    packed = make_case("prune_varlen", inputs)
    assert torch.equal(packed.ours(), (packed.eager()() + inputs.cu_seqlens[:-1, None]).flatten())


def test_the_first_image_is_the_same_in_every_batch() -> None:
    def tokens(batch: int) -> torch.Tensor:
        return cases.powerlaw_on(torch.device("cpu"), batch, 60, 32)

    assert torch.equal(tokens(4)[:2], tokens(2))
    assert not torch.equal(tokens(2)[0], tokens(2)[1])
    many, one = (Inputs(Row(b, 60, 8), 32, torch.float32, torch.device("cpu"), "powerlaw") for b in (3, 1))
    for name in ("relevance", "ranking", "mask"):
        assert torch.equal(getattr(many, name)[:1], getattr(one, name)), name


@pytest.mark.parametrize("op", OPS)
def test_a_batch_that_changes_an_image_is_refused(op: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's large batches are held to, with a device that says it is one."""
    case = make_case(op, inputs)
    assert inputs.query.shape[0] == 1
    assert len(inputs.cu_seqlens) == 3
    object.__setattr__(inputs, "device", torch.device("cuda"))  # all tensors are made
    monkeypatch.setattr(cases, "CHECKED", set())
    case.gate()
    assert len(cases.CHECKED) == 1
    honest = cases.Case.first_image

    def changed(case: cases.Case) -> tuple[torch.Tensor, ...]:
        parts = honest(case)
        return tuple(part.flip(-1) for part in parts) if case.inputs.row.batch > 1 else parts

    monkeypatch.setattr(cases.Case, "first_image", changed)
    with pytest.raises(AssertionError, match="differs between a batch and alone"):
        case.gate()


def test_csv_keeps_every_digit(tmp_path: pathlib.Path) -> None:
    written = [result("qcsp", "ours", ROWS[0], 1 / 3)]
    report.write_csv(written, {"device": "a, b"}, tmp_path / "out" / "x.csv")
    assert report.read_csv(tmp_path / "out" / "x.csv") == written


def test_every_dtype_and_row_parses() -> None:
    assert [Row.parse(row.name) for row in ROWS] == list(ROWS)
    assert all(torch.empty(0, dtype=dtype).is_floating_point() for dtype in DTYPES.values())


def test_model_of_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Its table is the one in the documentation, and none of its figures is said to be measured."""
    assert model.main([]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs" / "gpu.md").read_text()
    assert all(line.endswith("|  |") for line in table.splitlines()[2:])
    for make, *sizes in model.ROWS.values():
        assert all(0 < step.total < 0.01 for step in make(*sizes))
    # More picks, more tokens and more images than fit side by side take longer
    one = sum(step.total for step in model.dpp_map(1, 576, 64))
    assert one < sum(step.total for step in model.dpp_map(1, 576, 128))
    assert one < sum(step.total for step in model.dpp_map(1, 2880, 320))
    assert one < sum(step.total for step in model.dpp_map(200, 576, 64))


def test_threads_are_compared_on_a_busy_machine(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "threads.json", torch.get_num_threads()
    sizes = ["--rows", "64/8/B2", "--width", "32", "--seconds", "0.001"]
    assert threads.main(["--threads", "3", "--busy", "1", "--ops", "gsp", "qcsp", *sizes, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["op"], row["question"]) for row in found["figures"]] == [
        ("gsp", True),
        ("qcsp", True),
        ("qcsp", False),
    ]
    for row in found["figures"]:
        assert row["gain"] == pytest.approx(row["alone_ms"] / row["shared_ms"])
    assert torch.get_num_threads() == before
    assert capsys.readouterr().out.count("1 -> 3 threads") == 3


def test_what_keeps_a_core_busy_ends() -> None:
    with threads.busy(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)
