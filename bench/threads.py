"""python -m bench threads: what a second thread gains, on a quiet machine and while others compute on it.

Times of one thread and of several are taken in turns, a few hundred milliseconds each: what a loop learns about the
machine (csrc/core/thread_account.hpp) takes some calls. `--busy 1` keeps one core busy meanwhile, which must cost no
op more than it costs one thread.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.cases import DTYPES, OPS, Inputs, Row, make_case

ROWS = (Row(1, 2880, 320), Row(1, 576, 64), Row(8, 576, 64))
CPU_OPS = tuple(op for op in OPS if op not in ("mask_intersect", "prune_varlen"))
TURNS = 3


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """As many processes that compute for as long as this lasts."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(call: Callable[[], object], length: float) -> list[float]:
    """Of single calls, for `length` seconds."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + length
    while time.perf_counter() < end or len(taken) < 3:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def measure(call: Callable[[], object], threads: int, length: float) -> dict[str, float]:
    """Milliseconds of one thread and of `threads`, and how many times faster the latter are, by medians and means."""
    taken: dict[int, list[float]] = {1: [], threads: []}
    before = torch.get_num_threads()
    try:
        for _ in range(TURNS):
            for count in (1, threads):
                torch.set_num_threads(count)
                taken[count] += seconds(call, length)
    finally:
        torch.set_num_threads(before)
    alone, shared = taken[1], taken[threads]
    return {
        "alone_ms": 1e3 * statistics.median(alone),
        "shared_ms": 1e3 * statistics.median(shared),
        "gain": statistics.median(alone) / statistics.median(shared),
        "gain_of_means": statistics.mean(alone) / statistics.mean(shared),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench threads", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--rows", nargs="+", type=Row.parse, default=ROWS, help="tokens/keep/batch, as 2880/320/B1")
    parser.add_argument("--ops", nargs="+", choices=CPU_OPS, default=CPU_OPS)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seconds", type=float, default=0.4, help="of a turn; there are three for each")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    found = []
    with busy(options.busy):
        for row in options.rows:
            for op in options.ops:
                for asks in (True, False) if op in ("qcsp", "prune") else (True,):
                    inputs = Inputs(row, options.width, DTYPES[options.dtype], torch.device("cpu"), "powerlaw", asks)
                    case = make_case(op, inputs)
                    case.gate()
                    figures = measure(case.ours, options.threads, options.seconds)
                    found.append({"op": op, "row": row.name, "question": asks, **figures})
                    name = f"{op:16} {row.name:12} {'' if asks else 'query-free':10}"
                    times = f"{figures['alone_ms']:8.3f} -> {figures['shared_ms']:8.3f} ms"
                    gains = f"gain {figures['gain']:.2f}, of means {figures['gain_of_means']:.2f}"
                    print(f"{name} 1 -> {options.threads} threads: {times}  {gains}", flush=True)
    if options.out:
        about = {"threads": options.threads, "busy": options.busy, "width": options.width, "dtype": options.dtype}
        options.out.write_text(json.dumps({**about, "figures": found}, indent=1) + "\n")
    return 0
