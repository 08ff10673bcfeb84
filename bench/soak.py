"""A long run of prune and prune_varlen over random ragged shapes: python -m bench.soak [--calls N] [--out FOLDER].

Inputs are views of buffers made once, so that what grows is ours. Every hundredth of the run is a window: its latency
percentiles, in CPU time on one thread, so that other processes do not count, and at its end the bytes that malloc has
handed out and the resident set. Ends with status 1 if a call leaves a byte or more behind (a least-squares line through
all windows but the first tenth; some 100,000 calls are needed for what is taken once not to count).
"""

import argparse
import csv
import ctypes
import gc
import json
import pathlib
import random
import sys
import time
from typing import Any

import numpy as np
import torch

import script_kernels  # registers the ops
from bench.memory import status

WINDOWS = 100
LIMIT = 1.0  # bytes a call
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST, LONGEST = 64, 160


def heap_bytes() -> int:
    """What malloc has handed out and not got back (glibc 2.33 or later)."""

    class MallInfo(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t) for name in ("arena", "o", "s", "hblks", "hblkhd", "u", "f", "uord", "fo", "k")
        ]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo
    info = libc.mallinfo2()
    return int(info.uord) + int(info.hblkhd)


class Calls:
    """Random calls; `leak` bytes of each are kept, to see that the measure sees them."""

    def __init__(self, seed: int, leak: int = 0):
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.pool = {
            dtype: torch.randn(4, 3 * LONGEST, WIDEST, generator=generator).to(dtype).contiguous() for dtype in DTYPES
        }
        self.leak = leak
        self.left: list[bytearray] = []

    def options(self) -> dict[str, Any]:
        draw = self.random
        return {
            "negate": draw.random() < 0.5,
            "combine": draw.choice(("intersect", "restrict", "union")),
            "gsp_drop": draw.choice((0.0, 0.25, 0.4)),
            "rounds": draw.choice((1, 1, 2)),
            "floor": draw.choice((0.0, 0.3)),
            "power": draw.choice((1.0, 0.5)),
            "reduce": draw.choice(("mean", "max")),
        }

    def next(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """An op, its arguments and its options."""
        if self.leak:
            self.left.append(bytearray(self.leak))
        draw = self.random
        pool, width, query = self.pool[draw.choice(DTYPES)], draw.randint(1, WIDEST), draw.random() < 0.7
        if draw.random() < 0.5:
            batch, count = draw.randint(1, 3), draw.randint(1, LONGEST)
            tokens = pool[:batch, :count, :width]
            words = pool[3:, : draw.randint(1, 6), :width] if query else None
            return torch.ops.script.prune, (tokens, words, draw.randint(1, count)), self.options()
        lengths = [draw.randint(0, LONGEST // 2) for _ in range(draw.randint(1, 5))]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        keep = [draw.randint(1, length) if length else 0 for length in lengths]
        packed = pool[0, : sum(lengths), :width]
        words = pool[3:, :4, :width] if query else None
        return torch.ops.script.prune_varlen, (packed, starts, words, keep), self.options()


def soak(calls: int, seed: int = 0, leak: int = 0, windows: int = WINDOWS) -> list[dict[str, float]]:
    """One row per window: calls so far, microseconds at three percentiles, bytes handed out and resident."""
    torch.set_num_threads(1)
    source = Calls(seed, leak)
    size = max(1, calls // windows)
    taken = np.zeros(size)
    rows = []
    for _ in range(min(1000, size)):  # caches, arenas
        op, arguments, options = source.next()
        op(*arguments, **options)
    gc.collect()
    gc.disable()
    for window in range(calls // size):
        for i in range(size):
            op, arguments, options = source.next()
            before = time.thread_time()
            kept = op(*arguments, **options)
            taken[i] = time.thread_time() - before
            del kept
        gc.collect()
        row = {"calls": float((window + 1) * size), "heap": float(heap_bytes()), "resident": float(status("VmRSS"))}
        rows.append(row | {f"p{p}": float(np.percentile(taken, p)) * 1e6 for p in (50, 95, 99)})
    gc.enable()
    return rows


def slope(rows: list[dict[str, float]], field: str) -> float:
    """Growth of a field per call, by least squares, without the first tenth."""
    rows = rows[len(rows) // 10 :]
    return float(np.polyfit([row["calls"] for row in rows], [row[field] for row in rows], 1)[0])


def plot(rows: list[dict[str, float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, latency) = pyplot.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
    calls = [row["calls"] for row in rows]
    for field, name in (("heap", "handed out by malloc"), ("resident", "resident")):
        memory.plot(calls, [(row[field] - rows[0][field]) / 1024 for row in rows], label=name)
    memory.set_ylabel("KiB since the first window")
    memory.legend()
    for field in ("p50", "p95", "p99"):
        latency.plot(calls, [row[field] for row in rows], label=field)
    latency.set_ylabel("µs of CPU time a call")
    latency.set_yscale("log")
    latency.set_xlabel("calls of prune and prune_varlen")
    latency.legend()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/out"))
    parser.add_argument("--leak", type=int, default=0, help="bytes to leak with every call: the run must then fail")
    given = parser.parse_args()
    rows = soak(given.calls, given.seed, given.leak)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({key: round(value, 1) for key, value in row.items()} for row in rows)
    plot(rows, given.out / "soak.png")
    third = len(rows) // 3
    growth = {field: round(slope(rows, field), 4) for field in ("heap", "resident")}
    medians = {
        field: [round(float(np.median([row[field] for row in part])), 1) for part in (rows[:third], rows[-third:])]
        for field in ("p50", "p95", "p99")
    }
    facts = {"calls": given.calls, "bytes_a_call": growth, "microseconds_first_and_last_third": medians}
    print(json.dumps(facts | {"version": script_kernels.__version__}))
    return int(max(growth.values()) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
