"""python -m bench: one table, CSV and a plot. See bench/README.md."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

from bench import report, runs, timing
from bench.cases import DTYPES, OPS, QUICK_ROWS, ROWS, Inputs, Row
from script_kernels import testing

CPU_OPS = ("qcsp", "dpp_map", "gsp", "prune")
OUT = pathlib.Path(__file__).parent / "out"


def names(known: tuple[str, ...]):  # type: ignore[no-untyped-def]
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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times the ops; each result is checked first.")
    parser.add_argument("--cpu", action="store_true", help="against what people run today on a CPU, with the targets")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--ops", type=names(OPS), help="comma-separated: " + ",".join(OPS))
    parser.add_argument("--rows", type=rows, help="comma-separated N/k/B: " + ",".join(row.name for row in ROWS))
    parser.add_argument("--widths", type=lambda text: tuple(map(int, text.split(","))), help="token widths D")
    parser.add_argument("--dtypes", type=names(tuple(DTYPES)), default=("float32", "bfloat16"))
    parser.add_argument("--tokens", choices=testing.KINDS, default="powerlaw", help="kind of tokens (default powerlaw)")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=lambda text: tuple(map(int, text.split(","))), help="with --cpu: 1,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent per variant and case")
    parser.add_argument("--no-compile", action="store_true", help="with --cpu: leave out torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="with --cpu: leave out peak memory")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder of the CSV and the plot")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.02)
    if options.cpu and options.device.type != "cpu":
        parser.error("--cpu and --device exclude each other")
    return options


def shapes(options: argparse.Namespace) -> list[Inputs]:
    chosen = options.rows or (QUICK_ROWS if options.quick else ROWS)
    found = []
    for row in chosen:
        if options.widths:
            widths = options.widths
        elif options.quick:
            widths = (32,)
        else:
            # Width 4096, the language model's, for the shapes of one image or a small batch.
            widths = (1024, 4096) if options.cpu and row.tokens < 2880 else (1024,)
        for width in widths:
            for dtype in options.dtypes:
                found.append(Inputs(row, width, DTYPES[dtype], options.device, options.tokens))
    return found


def run_here(options: argparse.Namespace) -> list[report.Result]:
    """All cases in this process, with the number of threads it has."""
    peaks = timing.measure_peaks(options.device, **({"size": 256, "copy_bytes": 8 << 20} if options.quick else {}))
    reached = ", ".join(f"{str(d).removeprefix('torch.')} {f / 1e9:.0f} Gflop/s" for d, f in peaks.flops.items())
    print(f"peaks with {torch.get_num_threads()} threads: {reached}, copy {peaks.bandwidth / 1e9:.1f} GB/s", flush=True)
    if options.cpu:
        return runs.measure(
            shapes(options),
            options.ops or CPU_OPS,
            lambda case: runs.baseline_variants(case, not options.no_compile),
            "eager",
            peaks,
            options.seconds,
        )
    return runs.measure(shapes(options), options.ops or OPS, runs.oracle_variants, "reference", peaks, options.seconds)


def run_threads(arguments: list[str], threads: tuple[int, ...]) -> list[report.Result]:
    """The run once per number of threads, each in a process of its own: NumPy and OpenMP read theirs at the start."""
    results = []
    for count in threads:
        pools = {name: str(count) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "results.csv"
            command = [sys.executable, "-m", "bench", *arguments, "--worker", str(path)]
            subprocess.run(command, env=os.environ | pools, stdin=subprocess.DEVNULL, check=True)
            results += report.read_csv(path)
    return results


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if options.worker:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        report.write_csv(run_here(options), {}, options.worker)
        return 0

    facts = report.environment(options.device) | {"inputs": options.tokens}
    print("  ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    targets: list[report.Target] = []
    held: list[list[str]] = []
    if options.cpu:
        results = run_threads(arguments, options.threads or (1, 2))
        targets = runs.speed_targets(results, ROWS)
        if not (options.no_memory or options.quick):
            held, memory_targets = runs.measure_memory(options.ops or CPU_OPS)
            targets += memory_targets
    else:
        results = run_here(options)

    print(report.table(results))
    if held:
        print("\n" + report.layout(["op", "variant", "N", "peak MiB", "of N x N"], held))
    if targets:
        print("\n" + report.target_table(targets))
    stem = "cpu" if options.cpu else options.device.type
    stem = ("baselines-" if options.cpu else "ops-") + stem + ("-quick" if options.quick else "")
    report.write_csv(results, facts, options.out / f"{stem}.csv")
    report.plot(results, facts, options.out / f"{stem}.png")
    if targets or held:
        judged = [{"what": t.what, "wanted": t.wanted, "measured": t.measured, "met": t.met} for t in targets]
        (options.out / f"{stem}.json").write_text(json.dumps({"targets": judged, "memory": held, **facts}, indent=1))
    print(f"\nwritten: {options.out / stem}.csv and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
