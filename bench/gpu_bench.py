"""The measurements of the GPU report, one part per process: python -m bench.gpu_bench PART --out FILE [--seconds S].

Parts: facts, ceilings, steps (the DPP kernel by step, the launches of prune), ops. Each writes JSON; ops writes it anew
after every case, so that what was measured stays when the time is up. With --csv it also writes the rows as CSV.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import traceback

import torch

import script_kernels
from bench import baselines, gpu_cases, report, timing
from bench.cases import Case, Row, make_case
from bench.gpu_cases import DeviceInputs

SECONDS_PER_VARIANT = 0.12


def say(text: str) -> None:
    print(text, flush=True)


def environment(device: torch.device) -> dict[str, str]:
    """The facts that stand in every row; COMMIT names the commit where the tree is no git checkout."""
    if shutil.which("git"):
        known = report.environment(device)
    else:
        known = {
            "device": torch.cuda.get_device_name(device),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "script-kernels": script_kernels.__version__,
            "torch": torch.__version__,
            "commit": "unknown: git is not installed",
        }
    return known | ({"commit": os.environ["COMMIT"]} if os.environ.get("COMMIT") else {})


def facts(device: torch.device) -> dict[str, object]:
    """What a reader needs to know to believe a number."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        smi = f"nvidia-smi: {error}"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    properties = torch.cuda.get_device_properties(device)
    return environment(device) | {
        "triton": triton_version,
        "cuda": torch.version.cuda or "none",
        "driver, SM clock, its maximum, power limit": smi,
        "multiprocessors": str(properties.multi_processor_count),
        "L2 MiB": f"{properties.L2_cache_size / 2**20:.0f}",
        "memory GiB": f"{properties.total_memory / 2**30:.0f}",
    }


def ceilings(device: torch.device) -> dict[str, object]:
    """The best copy bandwidth (read + write) and matrix rates that PyTorch reaches here."""
    peaks = timing.measure_peaks(device, size=8192, copy_bytes=2 << 30)
    rates = {f"{str(dtype).removeprefix('torch.')} flop/s": rate for dtype, rate in peaks.flops.items()}
    return {"copy byte/s": peaks.bandwidth, **rates}


def read_peaks(path: pathlib.Path | None) -> timing.Peaks | None:
    """Ceilings written by an earlier process."""
    if path is None or not path.exists():
        return None
    found = json.loads(path.read_text())
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    flops = {dtype: found[f"{str(dtype).removeprefix('torch.')} flop/s"] for dtype in dtypes}
    return timing.Peaks(flops, found["copy byte/s"])


def launches(call) -> int:  # type: ignore[no-untyped-def]
    """How many kernels one call launches."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))])


def steps(device: torch.device) -> dict[str, object]:
    """dpp_map in a graph at k and k/2 picks: the slope is the time of a step, without what is paid once."""
    rows = []
    for tokens, keep in gpu_cases.SIZES:
        for batch in gpu_cases.BATCHES:
            say(f"steps: {tokens}/{keep}/B{batch}")
            row = Row(batch, tokens, keep)
            kernel = DeviceInputs(row, 1024, torch.bfloat16, device, "powerlaw").kernel
            variants = {
                str(k): gpu_cases.captured(functools.partial(script_kernels.dpp_map, kernel, k))
                for k in (keep // 2, keep)
            }
            times = timing.interleave(variants, device, seconds=SECONDS_PER_VARIANT)
            half, whole = times[str(keep // 2)].median, times[str(keep)].median
            rows.append(
                {
                    "tokens": tokens,
                    "keep": keep,
                    "batch": batch,
                    "seconds": whole,
                    "mean step": whole / keep,
                    "late step": (whole - half) / (keep - keep // 2),
                }
            )
            del kernel, variants
            release()
    inputs = DeviceInputs(Row(1, 576, 64), 4096, torch.bfloat16, device, "powerlaw")
    case = make_case("prune", inputs)
    return {"steps": rows, "launches of prune 576/64/B1 D4096": launches(case.ours)}


def release() -> None:
    """Gives freed memory back: a captured graph cannot use what the ordinary pool holds."""
    gc.collect()
    torch.cuda.empty_cache()


def check(case: Case) -> None:
    """The gate on the first image; a larger batch must give it the same result, bit for bit."""
    inputs = case.inputs
    assert isinstance(inputs, DeviceInputs)
    alone = make_case(case.op, gpu_cases.batch_of_one(inputs))
    if (case.op, inputs.row.tokens, inputs.row.keep, inputs.width, inputs.dtype) not in CHECKED:
        alone.gate()
        CHECKED.add((case.op, inputs.row.tokens, inputs.row.keep, inputs.width, inputs.dtype))
    if inputs.row.batch > 1:
        for found, expected in zip(gpu_cases.first_image(case), gpu_cases.first_image(alone), strict=True):
            assert torch.equal(found, expected), "the first image differs between a batch and alone"


CHECKED: set[tuple] = set()


def measure(case: Case, compiled: baselines.Compiled, peaks: timing.Peaks, compile_too: bool) -> list[report.Result]:
    """Ours and the reference, each eager and as a graph, and the reference under torch.compile."""
    row, inputs = case.inputs.row, case.inputs
    eager = gpu_cases.reference_call(case)
    variants: dict[str, timing.Variant] = {
        "ours": case.ours,
        "ours graph": gpu_cases.captured(case.ours),
        "reference": eager,
    }
    if row.batch * row.tokens**2 <= gpu_cases.MOST_ENTRIES_CAPTURED:
        variants["reference graph"] = gpu_cases.captured(eager)
    if compile_too:
        variants["reference compiled"] = gpu_cases.reference_call(case, compiled)
    timings = timing.interleave(variants, inputs.device, seconds=SECONDS_PER_VARIANT, max_rounds=40)
    flop_floor, byte_floor = peaks.floor(case.work.flops, case.work.bytes, inputs.dtype)
    return [
        report.Result(
            op=case.op,
            batch=row.batch,
            tokens=row.tokens,
            keep=row.keep,
            width=inputs.width,
            dtype=str(inputs.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            variant=name,
            median=found.median,
            p20=found.p20,
            p80=found.p80,
            rounds=found.rounds,
            reference=timings["reference"].median,
            flop_floor=flop_floor,
            byte_floor=byte_floor,
        )
        for name, found in timings.items()
    ]


def plan() -> list[tuple[str, Row, int, torch.dtype]]:
    """(op, row, width, dtype) of every case, the most important first."""
    cases = []
    for row, width in gpu_cases.shapes():
        for op in gpu_cases.MAIN_OPS:
            if op == "dpp_map" and width == 1024:  # a ready kernel is float32, whatever the tokens were
                cases.append((op, row, width, torch.float32))
            elif op != "dpp_map":
                cases.append((op, row, width, torch.bfloat16))
    cases += [
        (op, row, 1024, torch.float32) for row, width in gpu_cases.shapes() if width == 1024 for op in ("prune", "gsp")
    ]
    importance = {op: place for place, op in enumerate(gpu_cases.MAIN_OPS)}
    # prune and dpp_map everywhere, then the stages.
    return sorted(cases, key=lambda case: importance[case[0]] >= 2)


def lost_device(device: torch.device) -> str:
    """The error that every later call on the device will meet, or nothing."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error)
    return ""


def ops(device: torch.device, peaks: timing.Peaks, deadline: float, out: pathlib.Path, csv: pathlib.Path) -> None:
    """Every case of the plan that starts before the deadline (time.monotonic)."""
    results: list[report.Result] = []
    failures: list[dict[str, str]] = []
    left_out: list[str] = []
    compiled = baselines.Compiled()
    inputs: DeviceInputs | None = None
    case: Case | None = None
    known = environment(device)
    for op, row, width, dtype in plan():
        name = f"{op} {row.name} D{width} {str(dtype).removeprefix('torch.')}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        try:
            if inputs is None or (inputs.row, inputs.width, inputs.dtype) != (row, width, dtype):
                inputs = case = None
                release()
                inputs = DeviceInputs(row, width, dtype, device, "powerlaw")
            case = make_case(op, inputs)
            started = time.monotonic()
            check(case)
            checked = time.monotonic() - started
            # Every width and batch compiles anew, for seconds each: one is enough to know what it brings.
            found = measure(case, compiled, peaks, compile_too=width == 1024 and row.batch == 1)
            results += found
            best = min(result.median for result in found if result.variant.startswith("ours"))
            spent = time.monotonic() - started
            say(f"{name}: {best * 1e6:.1f} us ({checked:.1f} s of checks, {spent - checked:.1f} s of timing)")
        except Exception as error:
            say(f"{name}: FAILED\n{traceback.format_exc()}")
            failures.append({"case": name, "error": f"{type(error).__name__}: {error}"})
            inputs = None
        report.write_csv(results, known, csv)
        out.write_text(json.dumps({"failures": failures, "left out": left_out}))
        lost = lost_device(device)
        if lost:
            # Whatever came next in this process would fail for this case's fault.
            failures.append({"case": name, "error": f"the device is lost, no further case was run: {lost}"})
            break
    out.write_text(json.dumps({"failures": failures, "left out": left_out}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bench", description=__doc__)
    parser.add_argument("part", choices=("facts", "ceilings", "steps", "ops"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    parser.add_argument("--csv", type=pathlib.Path, help="with ops: CSV file of the rows")
    parser.add_argument("--ceilings", type=pathlib.Path, help="with ops: what the part `ceilings` wrote")
    parser.add_argument("--seconds", type=float, default=200.0, help="with ops: no case starts after this")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.part == "ops":
        deadline = time.monotonic() + options.seconds
        peaks = read_peaks(options.ceilings) or timing.measure_peaks(device, size=8192, copy_bytes=1 << 30)
        ops(device, peaks, deadline, options.out, options.csv or options.out.with_suffix(".csv"))
    else:
        part = {"facts": facts, "ceilings": ceilings, "steps": steps}[options.part]
        options.out.write_text(json.dumps(part(device), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
