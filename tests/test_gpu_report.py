"""The GPU report without a GPU: the dry run, how parts fail, what the report says, and its measurements on the CPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu_bench, gpu_cases, gpu_render, gpu_report, gpu_short, report, timing
from bench.cases import OPS, Row, make_case
from bench.gpu_report import FAILED, PASSED, Outcome, Step

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = [
    "build",
    "facts",
    "short",
    "tests",
    "memcheck",
    "racecheck",
    "synccheck",
    "ceilings",
    "steps",
    "prefill",
    "ops",
]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# The dry run


@without_gpu
@pytest.mark.parametrize("way", ["module", "make"])
def test_dry_run_lists_every_part_and_why_it_is_skipped(way: str) -> None:
    if way == "module":
        done = command(sys.executable, "-m", "bench.gpu_report", "--dry-run")
    else:
        done = command("make", "-s", "gpu-report", f"PYTHON={sys.executable}", "GPU_ARGS=--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[::3]] == [f"{n}. {name}" for n, name in enumerate(PARTS, 1)]
    reason = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    assert all(line == f"   skipped: no GPU: torch {torch.__version__} {reason}" for line in lines[2::3])


@without_gpu
def test_without_a_gpu_nothing_is_written_and_the_status_says_so(tmp_path: pathlib.Path) -> None:
    done = command(sys.executable, "-m", "bench.gpu_report", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "nothing was measured: torch" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_part_runs_something_that_exists(tmp_path: pathlib.Path) -> None:
    plan = gpu_report.steps(tmp_path, "90")
    assert [step.name for step in plan] == PARTS
    for step in plan:
        words = list(step.command)
        if "-m" in words:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None, module
        else:
            assert (ROOT / words[1]).is_file(), words
    # Every part but the last can use up its limit, and the last still gets time.
    assert sum(step.limit for step in plan[:-1]) <= gpu_report.BUDGET - gpu_report.RESERVE - 40


# Parts that fail


def python(name: str, code: str, limit: float = 30.0) -> Step:
    return Step(name, f"the part {name}", (sys.executable, "-c", code), limit)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("")
    # A grandchild holds the output open: the limit must end it too.
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    plan = [
        python("broken", "print('before'); raise SystemExit('out of memory')"),
        python("hanging", hang, limit=1.5),
        Step("absent", "a tool that is not installed", ("no-such-sanitizer",), 5),
        python("sound", "print('all is well')"),
    ]
    started = time.monotonic()
    outcomes = gpu_report.execute(plan, tmp_path, log, started)
    assert time.monotonic() - started < 30
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED, FAILED, PASSED]
    assert outcomes[0].detail.splitlines() == ["exit status 1", "before", "out of memory"]
    assert outcomes[1].detail.startswith("stopped at its limit of 2 s")
    assert "no-such-sanitizer" in outcomes[2].detail
    assert "all is well" in log.read_text()

    text = gpu_render.compose(outcomes, {"device": "a test"}, {}, {}, [], [], 3.0)
    failures, targets = text.index("## Failures"), text.index("## Targets")
    for name in ("broken", "hanging", "absent"):
        assert failures < text.index(f"**{name}**") < targets
    assert "out of memory" in text[failures:targets]
    assert "**sound**" not in text


def test_the_last_part_gets_the_time_that_is_left(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("")
    show = Step("ops", "its arguments", (sys.executable, "-c", "import sys; print(sys.argv[1:])"), gpu_report.BUDGET)
    gpu_report.execute([show], tmp_path, log, time.monotonic() - 300)
    seconds = int(log.read_text().split("'--seconds', '")[-1].split("'")[0])
    assert seconds == pytest.approx(gpu_report.BUDGET - gpu_report.RESERVE - 300 - 15, abs=2)


def test_counts_of_tests_and_failed_cases_reach_the_report(tmp_path: pathlib.Path) -> None:
    plan = {step.name: step for step in gpu_report.steps(tmp_path, "90")}
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite name="pytest" errors="0" failures="2" skipped="3" tests="40" time="1"/></testsuites>'
    )
    counted = gpu_report.refine(Outcome(plan["tests"], FAILED, 1.0, "exit status 1"), tmp_path)
    assert counted.detail.splitlines() == ["40 tests, 2 failures, 0 errors, 3 skipped", "exit status 1"]

    failure = {"case": "qcsp 576/64/B1 D1024 bfloat16", "error": "AssertionError: image 0, step 3"}
    (tmp_path / "ops.json").write_text(json.dumps({"failures": [failure], "left out": []}))
    failed = gpu_report.refine(Outcome(plan["ops"], PASSED, 1.0), tmp_path)
    assert failed.status == FAILED
    assert failed.detail == "qcsp 576/64/B1 D1024 bfloat16: AssertionError: image 0, step 3"

    (tmp_path / "ops.json").write_text(json.dumps({"failures": [], "left out": ["gsp 8192/640/B32 D4096 bfloat16"]}))
    short = gpu_report.refine(Outcome(plan["ops"], PASSED, 1.0), tmp_path)
    assert short.status == PASSED
    text = gpu_render.compose([short], {}, {}, {}, [], [], 1.0)
    assert "no time left for 1 cases: gsp 8192/640/B32 D4096 bfloat16" in text[: text.index("## Targets")]


# Targets


def timed(op: str, row: Row, width: int, variant: str, microseconds: float) -> report.Result:
    dtype = "float32" if op == "dpp_map" else "bfloat16"
    median = microseconds * 1e-6
    times = (median, median * 0.9, median * 1.1)
    return report.Result(op, row.batch, row.tokens, row.keep, width, dtype, 1, variant, *times, 9, 1e-3, 1e-6, 2e-6)


def test_targets_are_met_missed_or_not_measured() -> None:
    one, five = Row(1, 576, 64), Row(5, 576, 32)
    results = [
        timed("dpp_map", one, 1024, "ours graph", 60.0),
        timed("dpp_map", one, 1024, "reference graph", 479.0),
        timed("dpp_map", Row(8, 576, 64), 1024, "ours graph", 61.0),
        timed("prune", one, 4096, "ours graph", 149.0),
        timed("prune", one, 1024, "ours graph", 1.0),
        timed("prune", five, 4096, "ours graph", 250.0),
        timed("prune", one, 4096, "ours", 100.0),
        timed("prune", one, 4096, "reference", 4000.0),
    ]
    verdicts = {goal.what: goal.verdict for goal in gpu_render.goals(results, 7)}
    assert verdicts == {
        "dpp_map B1 576/64 in a graph": "met",
        "dpp_map B8 576/64 in a graph": "NOT MET",
        "dpp_map B32 576/64 in a graph": "NOT MEASURED",
        "dpp_map B1 2880/320 in a graph": "NOT MEASURED",
        "dpp_map B1 8192/640 in a graph": "NOT MEASURED",
        "prune B1 576/64 D4096 bfloat16 in a graph": "met",
        "prune B5 576/32 D4096 bfloat16 in a graph": "NOT MET",
        "dpp_map B1 576/64, ours: times faster than reference": "NOT MEASURED",
        "dpp_map B1 576/64, ours graph: times faster than reference graph": "NOT MET",
        "prune B1 576/64, ours: times faster than reference": "met",
        "prune B1 576/64, ours graph: times faster than reference graph": "NOT MEASURED",
        "prune B1 576/64: kernel launches": "NOT MET",
    }


def test_the_plan_holds_every_op_shape_width_and_batch_the_targets_first() -> None:
    plan = gpu_bench.plan()
    assert len(set(plan)) == len(plan)
    assert {op for op, *_ in plan} == set(OPS)
    for op in OPS:
        rows = {(row.tokens, row.keep, row.batch, width) for name, row, width, _ in plan if name == op}
        widths = (1024,) if op == "dpp_map" else (1024, 4096)
        assert rows >= {(n, k, b, w) for n, k in gpu_cases.SIZES for b in (1, 8, 32) for w in widths}, op
    assert plan[0][:3] == ("prune", Row(1, 576, 64), 4096)
    assert plan[1][:3] == ("prune", Row(5, 576, 32), 4096)


# The measurements, on the CPU


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(gpu_cases, "captured", lambda call: call)  # a CPU has no graphs
    monkeypatch.setattr(gpu_bench, "SECONDS_PER_VARIANT", 0.002)
    monkeypatch.setattr(gpu_bench, "CHECKED", set())
    return torch.device("cpu")


PEAKS = timing.Peaks({torch.float32: 1e11, torch.bfloat16: 1e11, torch.float16: 1e11}, 1e10)


def test_ops_are_checked_and_timed_and_a_bad_case_is_recorded(
    on_the_cpu: torch.device, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(2, 96, 12)
    plan = [(op, row, 48, torch.float32) for op in OPS]
    monkeypatch.setattr(
        gpu_bench, "plan", lambda: [*plan[:3], ("prune", Row(2, 96, 200), 48, torch.float32), *plan[3:]]
    )
    out, csv = tmp_path / "ops.json", tmp_path / "results.csv"
    gpu_bench.ops(on_the_cpu, PEAKS, time.monotonic() + 600, out, csv)
    results = report.read_csv(csv)
    assert {result.op for result in results} == set(OPS)
    variants = {"ours", "ours graph", "reference", "reference graph"}
    assert all({r.variant for r in results if r.op == op} == variants for op in OPS)
    (failure,) = json.loads(out.read_text())["failures"]
    assert failure["case"] == "prune 96/200/B2 D48 float32"
    assert "keep" in failure["error"]


def test_cases_past_the_deadline_are_listed(
    on_the_cpu: torch.device, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bench, "plan", lambda: [("gsp", Row(1, 96, 12), 48, torch.float32)])
    gpu_bench.ops(on_the_cpu, PEAKS, time.monotonic() - 1, tmp_path / "ops.json", tmp_path / "results.csv")
    assert json.loads((tmp_path / "ops.json").read_text()) == {
        "failures": [],
        "left out": ["gsp 96/12/B1 D48 float32"],
    }


def test_the_references_select_what_the_ops_select() -> None:
    """On clear-cut inputs, so that a reference does not measure something else than ours."""
    inputs = gpu_cases.DeviceInputs(Row(3, 60, 8), 64, torch.float32, torch.device("cpu"), "powerlaw")
    for op in ("mask_intersect", "prune", "dpp_map", "qcsp"):
        case = make_case(op, inputs)
        ours, theirs = case.ours(), gpu_cases.reference_call(case)()
        assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, theirs), op
    case = make_case("bipartite_match", inputs)
    for ours, theirs in zip(case.ours(), gpu_cases.reference_call(case)(), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-5)
    packed = make_case("prune_varlen", inputs)
    starts = inputs.cu_seqlens[:-1, None]
    assert torch.equal(packed.ours(), (gpu_cases.reference_call(packed)() + starts).flatten())


def test_an_image_of_a_large_batch_is_that_of_a_small_one() -> None:
    def tokens(batch: int) -> torch.Tensor:
        return gpu_cases.DeviceInputs(Row(batch, 60, 8), 32, torch.bfloat16, torch.device("cpu"), "powerlaw").tokens

    assert torch.equal(tokens(4)[:2], tokens(2))
    assert not torch.equal(tokens(2)[0], tokens(2)[1])


def test_a_batch_that_changes_an_image_is_refused(on_the_cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = gpu_cases.DeviceInputs(Row(2, 60, 8), 32, torch.float32, on_the_cpu, "powerlaw")
    case = make_case("qcsp", inputs)
    gpu_bench.check(case)
    honest = gpu_cases.first_image
    monkeypatch.setattr(
        gpu_cases, "first_image", lambda c: tuple(p.flip(1) if c.inputs.row.batch == 2 else p for p in honest(c))
    )
    with pytest.raises(AssertionError, match="differs between a batch and alone"):
        gpu_bench.check(case)


def test_the_short_run_passes_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_short.main(["--device", "cpu"]) == 0
    assert "runs of every op passed" in capsys.readouterr().out


# The folder


def test_the_folder_holds_report_rows_plots_and_log(tmp_path: pathlib.Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    results = [
        timed(op, Row(1, 576, 64), 1024, variant, 50.0 * (1 + place))
        for op in ("dpp_map", "qcsp")
        for place, variant in enumerate(["ours graph", "ours", "reference graph", "reference"])
    ]
    facts = {"device": "a test", "date": "2026-01-01", "commit": "abc", "torch": "2.11"}
    report.write_csv(results, facts, work / "results.csv")
    (work / "facts.json").write_text(json.dumps(facts))
    (work / "ceilings.json").write_text(json.dumps({"copy byte/s": 3e12, "bfloat16 flop/s": 7.9e14}))
    step = {"tokens": 576, "keep": 64, "batch": 1, "seconds": 5e-5, "mean step": 7.8e-7, "late step": 9e-7}
    (work / "steps.json").write_text(json.dumps({"steps": [step], "launches of prune 576/64/B1 D4096": 5}))
    (work / "log.txt").write_text("what the parts printed\n")
    gpu_render.write([Outcome(python("ops", ""), PASSED, 9.0)], work, out, "a test", 99.0)

    assert sorted(path.name for path in out.iterdir()) == [
        "log.txt",
        "report.md",
        "results.csv",
        "results.json",
        "steps.png",
        "times.png",
    ]
    text = (out / "report.md").read_text()
    assert "None: every part passed." in text
    assert "| dpp_map | 1 | 576 | 64 | 1024 | float32 | 100 | 50 | 200 | 150 |  | 2.0 | 3.0 | 2 |" in text
    assert "| 576 | 64 | 1 | 50 | 0.78 | 0.9 | 30 | 1.67 |" in text
    assert "| copy byte/s | 3 TB/s |" in text
    assert "| bfloat16 flop/s | 790 Tflop/s |" in text
    record = json.loads((out / "results.json").read_text())
    assert record["targets"][0]["verdict"] == "met"
    assert report.read_csv(out / "results.csv") == results


def test_a_plot_that_fails_is_reported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(gpu_render, "plot_steps", fail)
    step = {"tokens": 576, "keep": 64, "batch": 1, "seconds": 5e-5, "mean step": 7.8e-7, "late step": 9e-7}
    (tmp_path / "steps.json").write_text(json.dumps({"steps": [step]}))
    out = tmp_path / "out"
    out.mkdir()
    gpu_render.write([Outcome(python("ops", ""), PASSED)], tmp_path, out, "a test", 1.0)
    text = (out / "report.md").read_text()
    assert "steps.png: RuntimeError: no fonts" in text[: text.index("## Targets")]


def test_the_report_shows_the_prefill(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prefill").mkdir()
    header = "preset,keep,prompt,llm_ms,prune_ms,first_token_ms,llm_speedup,gflops\n"
    (tmp_path / "prefill" / "prefill-tiny.csv").write_text(header + "tiny,160,208,60.0,1.25,80.0,6.9,1234.5\n")
    step = Step("prefill", "whole models", (sys.executable, "-c", ""), 5)
    outcome = gpu_report.refine(gpu_report.Outcome(step, gpu_report.PASSED, 1.0), tmp_path)
    assert outcome.detail == (
        "tiny keep 160: prompt 208, LLM 60.00 ms, pruning 1.25 ms, first token 80.00 ms, "
        "LLM with pruning 6.90x, 1234 GFLOP"
    )
