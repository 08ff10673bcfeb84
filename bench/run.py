"""python -m bench [run]: one table, CSV and a plot. See bench/README.md."""

import argparse
import gc
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

import torch

from bench import baselines, memory, report, targets, timing
from bench.cases import DTYPES, GPU_ROWS, OPS, QUICK_ROWS, ROWS, Case, Inputs, Row, make_case
from script_kernels import testing

CPU_OPS = ("qcsp", "dpp_map", "gsp", "prune")
MEMORY_TOKENS = (8192, 32768)
OUT = pathlib.Path(__file__).parent / "out"
# Beyond this many entries of L, three copies of it and a captured graph's private ones do not fit beside each other.
MOST_ENTRIES_CAPTURED = 1 << 30


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(unknown)}")
        return chosen

    return parse


def rows(text: str) -> tuple[Row, ...]:
    try:
        return tuple(Row.parse(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError("expected rows as N/k/B, like 576/64/B8,2880/320/B1") from error


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times the ops; each result is checked first.",
        epilog="Other commands: python -m bench compare | prefill | released, each with --help.",
    )
    parser.add_argument("--cpu", action="store_true", help="against what people run today on a CPU, with the targets")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--ops", type=names(OPS), help="comma-separated: " + ",".join(OPS))
    parser.add_argument("--rows", type=rows, help="comma-separated N/k/B: " + ",".join(row.name for row in ROWS))
    parser.add_argument("--widths", type=numbers, help="token widths D")
    parser.add_argument("--dtypes", type=names(tuple(DTYPES)), default=("float32", "bfloat16"))
    parser.add_argument("--tokens", choices=testing.KINDS, default="powerlaw", help="kind of tokens (powerlaw)")
    parser.add_argument("--no-query", action="store_true", help="prune without one, qcsp with a relevance of 1 for all")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cuda: the baselines and CUDA graphs too")
    parser.add_argument("--threads", type=numbers, help="with --cpu: 1,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent per variant and case")
    parser.add_argument("--budget", type=float, default=math.inf, help="no case starts after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="with --cpu: leave out peak memory")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder of the CSV and the plot")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.02)
    if options.cpu and options.device.type != "cpu":
        parser.error("--cpu and --device exclude each other")
    return options


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Row, int, str]]:
    """(op, row, width, dtype) of every case."""
    gpu = options.device.type == "cuda"
    chosen = options.rows or (QUICK_ROWS if options.quick else GPU_ROWS if gpu else ROWS)
    ops = options.ops or (CPU_OPS if options.cpu else OPS)
    # On a GPU time is short: prune and dpp_map at every shape come before the stages.
    for part in [ops[:2], ops[2:]] if gpu else [ops]:
        for row in chosen:
            # Width 4096, the language model's, for the shapes of one image or a small batch.
            wide = gpu or (options.cpu and row.tokens < 2880)
            widths = options.widths or ((32,) if options.quick else (1024, 4096) if wide else (1024,))
            for width, dtype in itertools.product(widths, options.dtypes):
                for op in part:
                    if op != "dpp_map":
                        yield op, row, width, dtype
                    # A ready kernel is float32 and N x N: width and dtype of the tokens change nothing about it.
                    elif (width, dtype) == (widths[0], options.dtypes[0]):
                        yield op, row, width, "float32"


def variants(case: Case, options: argparse.Namespace) -> dict[str, timing.Variant]:
    """Ours and what it is compared with."""
    inputs, row = case.inputs, case.inputs.row
    if inputs.device.type == "cuda":
        found: dict[str, timing.Variant] = {"ours": case.ours, "eager": case.eager()}
        found["ours graph"] = timing.captured(case.ours)
        if row.batch * row.tokens**2 <= MOST_ENTRIES_CAPTURED:
            found["eager graph"] = timing.captured(case.eager())
        # Every width and batch compiles anew, for seconds each: one is enough to know what it brings.
        if not options.no_compile and inputs.width == 1024 and row.batch == 1:
            found["compiled"] = case.eager(compiled=True)
        return found
    if not options.cpu:
        return {"ours": case.ours, "reference": case.oracle}
    found = {"ours": case.ours, "eager": case.eager()}
    if not options.no_compile:
        found["compiled"] = case.eager(compiled=True)
    if case.op == "qcsp":
        tokens, relevance = inputs.tokens.float().numpy(), inputs.relevance.numpy()
        found["numpy"] = lambda: baselines.numpy_qcsp(tokens, relevance, row.keep)
    if case.op == "dpp_map":
        kernel = inputs.kernel.numpy()
        found["numpy"] = lambda: baselines.numpy_dpp_map(kernel, row.keep)
    else:
        found["bmm of S"] = lambda: torch.bmm(inputs.tokens, inputs.tokens.mT)
    return found


def measure(case: Case, options: argparse.Namespace, peaks: timing.Peaks) -> list[report.Result]:
    """Gate, then time. AssertionError from the gate: no number without a right result."""
    inputs, row = case.inputs, case.inputs.row
    case.gate()
    timings = timing.interleave(variants(case, options), inputs.device, seconds=options.seconds)
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
            reference=timings["reference" if "reference" in timings else "eager"].median,
            flop_floor=flop_floor,
            byte_floor=byte_floor,
            floor_from=peaks.origin(inputs.dtype),
        )
        for name, found in timings.items()
    ]


def run_here(options: argparse.Namespace, facts: dict[str, str], path: pathlib.Path) -> tuple[list[report.Result], int]:
    """All cases in this process; the rows are written after each. A case that fails is named, and the rest is measured.

    Returns the rows and the exit status: 1 if a case failed, 130 if the run was interrupted.
    """
    device = options.device
    large = device.type == "cuda"
    size, copied = (256, 8 << 20) if options.quick else (8192, 2 << 30) if large else (2048, 256 << 20)
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = timing.measure_peaks(device, size=size, copy_bytes=copied)
    print(f"peaks with {torch.get_num_threads()} threads: ", end="")
    print("; ".join(peaks.origin(dtype) for dtype in peaks.flops), flush=True)
    results: list[report.Result] = []
    status = left_out = 0
    deadline = time.monotonic() + options.budget
    inputs: Inputs | None = None
    case: Case | None = None
    try:
        for op, row, width, dtype in plan(options):
            if time.monotonic() > deadline:
                left_out += 1
                continue
            name = f"{op} {row.name} D{width} {dtype} threads {torch.get_num_threads()}"
            print(name, file=sys.stderr, flush=True)
            try:
                if inputs is None or (inputs.row, inputs.width, inputs.dtype) != (row, width, DTYPES[dtype]):
                    inputs = case = None
                    gc.collect()
                    if large:
                        torch.cuda.empty_cache()  # a captured graph cannot use what the ordinary pool holds
                    inputs = Inputs(row, width, DTYPES[dtype], device, options.tokens, not options.no_query)
                case = make_case(op, inputs)
                results += measure(case, options, peaks)
                report.write_csv(results, facts, path)
            except Exception:
                print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                status, inputs, case = 1, None, None
                if large:
                    torch.cuda.synchronize()  # a lost device would fail whatever comes next for this case's fault
    except (KeyboardInterrupt, RuntimeError) as error:
        print(f"stopped: {type(error).__name__} {error}", file=sys.stderr, flush=True)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if left_out:
        print(f"no time left for {left_out} cases", flush=True)
    return results, status


def run_threads(arguments: list[str], threads: tuple[int, ...]) -> tuple[list[report.Result], int]:
    """The run once per number of threads, each in a process of its own: NumPy and OpenMP read theirs at the start."""
    results, status = [], 0
    for count in threads:
        pools = {name: str(count) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "results.csv"
            command = [sys.executable, "-m", "bench", *arguments, "--worker", str(path)]
            try:
                done = subprocess.run(command, env=os.environ | pools, stdin=subprocess.DEVNULL, check=False)
                status = status or done.returncode
            except KeyboardInterrupt:
                status = 130
            results += report.read_csv(path) if path.exists() else []
            if status == 130:
                break
    return results, status


def measure_memory(ops: tuple[str, ...], width: int = 1024, keep: int = 640) -> tuple[list, list[targets.Target]]:
    """Rows (op, variant, N, MiB, share of an N x N float32 matrix), and the targets."""
    held, judged = [], []
    for op in (op for op in ops if op in ("qcsp", "gsp", "prune")):
        ours = []
        # The baseline is measured at the small size only: at the large one it needs several times 4 GiB.
        for variant, count in (("ours", MEMORY_TOKENS[0]), ("eager", MEMORY_TOKENS[0]), ("ours", MEMORY_TOKENS[1])):
            print(f"memory of {op}, {variant}, N = {count}", file=sys.stderr, flush=True)
            peak = memory.measure(op, variant, count, keep, width)
            held.append([op, variant, str(count), f"{peak / 2**20:.0f}", f"{peak / (4 * count**2):.2f}"])
            if variant == "ours":
                ours.append((count, peak))
        judged += targets.memory_targets(op, *ours)
    return held, judged


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    if options.worker:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return run_here(options, {}, options.worker)[1]

    gpu = options.device.type == "cuda"
    facts = report.environment(options.device) | {"inputs": options.tokens + (", no query" if options.no_query else "")}
    print("  ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    stem = ("baselines-" if options.cpu or gpu else "ops-") + options.device.type + ("-quick" if options.quick else "")
    stem += "-no-query" if options.no_query else ""
    path = options.out / f"{stem}.csv"
    held: list[list[str]] = []
    if options.cpu:
        results, status = run_threads(arguments, options.threads or (1, 2))
        report.write_csv(results, facts, path)
        judged = targets.judge_no_query(results) if options.no_query else targets.judge(results)
        if not (options.no_memory or options.quick or status):
            held, more = measure_memory(options.ops or CPU_OPS)
            judged += more
    else:
        results, status = run_here(options, facts, path)
        judged = targets.judge(results, gpu) if gpu else []

    if not results:
        print("nothing was measured", file=sys.stderr)
        return status or 1
    print(report.table(results))
    if held:
        print("\n" + report.layout(["op", "variant", "N", "peak MiB", "of N x N"], held))
    if judged:
        print("\n" + report.target_table(judged))
    if judged or held:
        record = [{"what": t.what, "wanted": t.wanted, "measured": t.measured, "met": t.met} for t in judged]
        path.with_suffix(".json").write_text(json.dumps({"targets": record, "memory": held, **facts}, indent=1))
    try:
        report.plot(results, facts, path.with_suffix(".png"))
        print(f"\nwritten: {path} and .png")
    except ImportError as error:
        print(f"\nwritten: {path}; no plot: {error}")
    return status
