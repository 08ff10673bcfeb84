"""python -m bench model: what the Triton kernels should take on an H100, from what they fetch, wait for and issue.

A model, not a measurement: the figures of the hardware are published or taken from microbenchmarks of others, those of
the greedy steps (instructions of a chunk of rows) are counted in machine code by `tests/test_targets.py`. What it is
good for is the comparison of two designs, and the order of what to look at first.
"""

import argparse
import dataclasses
import math
from typing import Any

from bench.targets import MICROSECONDS


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An H100 SXM: NVIDIA's data sheet; latencies from microbenchmarks of Hopper (Luo et al. 2024), rounded."""

    processors: int = 132
    clock: float = 1.755e9  # Hz
    issue: int = 4  # warp instructions a cycle and processor
    memory: float = 3.35e12 * 0.85  # bytes/s that a kernel reaches
    l2: float = 5.5e12
    tensor: float = 989e12 * 0.6  # bf16 flop/s that tiles of 64 x 64 reach
    tf32: float = 495e12 * 0.6  # of TF32
    l2_trip: float = 0.16e-6  # s, a load that L2 answers
    l1_trip: float = 0.02e-6
    l1: float = 192e3  # bytes of it that hold C
    memory_trip: float = 0.45e-6
    launch: float = 1.5e-6  # from one kernel of a graph to the next
    barrier: float = 0.03e-6  # of a block
    dependent: float = 5.0  # cycles from one instruction to the next that needs it


H100 = Gpu()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of C that a program takes at once, counted in machine code for sm_90."""

    warps: int
    rows: int  # whose C[:, j] is asked for at once
    instructions: int  # of a warp for these rows
    others: int  # for all else that a pick takes: what is left of the rows, the pick itself, the keys
    # Of programs that share an image and ask for two chunks at once: cycles of a warp for them by the control codes,
    # waits for L2 and L1 included; and instructions and cycles for the last chunk where their number is odd
    cycles: int = 0
    half: int = 0
    half_cycles: int = 0


# By the columns of a program
CHUNKS = {
    64: Chunk(2, 112, 180, 638, 820, 171, 632),
    256: Chunk(4, 32, 100, 657),
    640: Chunk(4, 12, 95, 742),
    1024: Chunk(8, 12, 78, 599),
    2048: Chunk(8, 8, 106, 1180),
}
# Kind of tokens -> bytes, side of a tile, columns of a step, products of a tensor core in one of ours, warps,
# instructions of a warp (sm_90) for a step.
TILES = {"bf16": (2, 64, 64, 1, 8, 113), "fp32": (4, 64, 16, 3, 4, 243)}
STEP_BARRIERS = 5  # reductions of the keys, the row of C handed on


@dataclasses.dataclass(frozen=True)
class Step:
    """One launch: us spent on bandwidth or arithmetic, on instructions, on waiting for memory."""

    name: str
    work: float
    instructions: float
    waiting: float

    @property
    def total(self) -> float:
        return H100.launch + max(self.work, self.instructions) + self.waiting


def greedy(columns: int, slots: int, images: int, n: int, picks: int) -> Step:
    """The picks of one image; images run side by side."""
    chunk = CHUNKS[columns]
    shared = slots > 1
    rounds = math.ceil(images * slots / H100.processors) if not shared else 1
    turns = max(chunk.warps / H100.issue, 1.0)

    def seconds(instructions: int, products: int) -> float:
        # The rows of a column are one chain of sums: with few columns in a thread that, and not the issue, is the limit
        return max(instructions * turns, products * H100.dependent) / H100.clock

    issued = waited = fetched = 0.0
    for m in range(picks):
        whole, left = divmod(m, chunk.rows)
        issued += whole * seconds(chunk.instructions, chunk.rows)
        waited += STEP_BARRIERS * H100.barrier
        if shared and chunk.cycles:
            waited += whole * (chunk.cycles / H100.clock - seconds(chunk.instructions, chunk.rows))
            if left >= chunk.rows // 2:  # what is left behind it is asked for with it
                left -= chunk.rows // 2
                issued += seconds(chunk.half, chunk.rows // 2)
                waited += chunk.half_cycles / H100.clock - seconds(chunk.half, chunk.rows // 2)
            elif left or not m:
                waited += H100.l2_trip
        else:
            # A chunk's loads come back together, and with one of them L[j], which is asked for before. A program that
            # shares no image has read all rows but the last before.
            far = shared or 4 * n * m > H100.l1
            waited += H100.l2_trip + max(math.ceil(m / chunk.rows) - 1, 0) * (H100.l2_trip if far else H100.l1_trip)
        issued += seconds(chunk.others, left)
        if shared:  # the fence until the row is in L2, the exchange, the poll that sees it
            waited += 3 * H100.l2_trip
        fetched += 4 * (m + 1) * n * images
    return Step("greedy", fetched / H100.l2, rounds * issued, rounds * waited)


def pairs(images: int, n: int, width: int, kind: str) -> Step:
    size, side, depth, products, warps, instructions = TILES[kind]
    tiles = images * math.ceil(n / side) * (math.ceil(n / side) + 1) // 2
    waves = math.ceil(tiles / H100.processors)
    steps = waves * width / depth
    flop = waves * H100.processors * side * side * width * 2 * products
    moved = tiles * 2 * side * width * size / H100.l2 + images * n * n * 4 / H100.memory
    issued = steps * instructions * max(warps / H100.issue, 1.0) / H100.clock
    multiplied = flop / (H100.tensor if kind == "bf16" else H100.tf32)
    return Step("pairs", max(multiplied, moved), issued, steps / 3 * H100.l2_trip + H100.memory_trip)


def rows(images: int, n: int, width: int, kind: str) -> Step:
    return Step("rows", images * n * width * TILES[kind][0] / H100.memory, 0.0, 2 * H100.memory_trip)


def small(name: str, trips: int) -> Step:
    """A launch that does little but fetch one thing after the other."""
    return Step(name, 0.0, 0.0, trips * H100.l2_trip)


def plan(images: int, n: int, picks: int) -> tuple[int, int]:
    """Columns and programs of an image, as the dispatch chooses on this GPU."""
    import torch

    from script_kernels.triton.kernels.layout import Layout
    from script_kernels.triton.kernels.plan import plan_greedy

    found = plan_greedy(torch.device("meta"), Layout(images, n), picks, picks=picks)
    return found.columns, found.slots


def dpp_map(images: int, n: int, keep: int) -> list[Step]:
    return [greedy(*plan(images, n, keep), images, n, keep)]


def prune(images: int, n: int, keep: int, width: int = 4096, kind: str = "bf16") -> list[Step]:
    picks = min(2 * keep, math.ceil(keep * n / (n - n // 4)))
    sources = n / 2 / 512
    return [
        small("query", 4 + width // 1024),
        rows(images, n, width, kind),
        pairs(images, n, width, kind),
        small("select", math.ceil(11 * sources) * 2),
        greedy(*plan(images, n, picks), images, n, picks),
        small("intersect", 6 + 3 * math.ceil(n / 1024)),
    ]


ROWS: dict[str, tuple[Any, ...]] = {
    "dpp_map 576/64 B1": (dpp_map, 1, 576, 64),
    "dpp_map 576/64 B32": (dpp_map, 32, 576, 64),
    "dpp_map 2880/320 B1": (dpp_map, 1, 2880, 320),
    "dpp_map 8192/640 B1": (dpp_map, 1, 8192, 640),
    "prune 576/64 B1, D 4096 bf16": (prune, 1, 576, 64),
    "prune 2880/320 B1, D 4096 bf16": (prune, 1, 2880, 320),
    "prune 576/64 B1, D 1024 fp32": (prune, 1, 576, 64, 1024, "fp32"),
    "prune 2880/320 B1, D 1024 fp32": (prune, 1, 2880, 320, 1024, "fp32"),
}


def wanted(name: str) -> str:
    """The figure of `bench.targets`, where there is one."""
    for (op, row, _, _), most in MICROSECONDS.items():
        if f"{name},".startswith(f"{op} {row.tokens}/{row.keep} B{row.batch},"):
            return f"{most:,.0f}"
    return "-"


def table() -> str:
    lines = [
        "| us, H100, in a graph | model | of it greedy: instructions | of it greedy: waiting | wanted | measured |",
        "|---|---|---|---|---|---|",
    ]
    for name, (make, *sizes) in ROWS.items():
        steps = make(*sizes)
        walk = next(step for step in steps if step.name == "greedy")
        cells = (sum(step.total for step in steps), walk.instructions, walk.waiting)
        lines.append(
            "| "
            + " | ".join(
                [name, *(f"{cell * 1e6:,.0f}" for cell in cells), "-" if name.endswith("fp32") else wanted(name), ""]
            )
            + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench model", description="A model of the GPU path; no GPU is used."
    )
    parser.add_argument("--steps", action="store_true", help="every launch of every row")
    options = parser.parse_args(arguments)
    print(table())
    if options.steps:
        for name, (make, *sizes) in ROWS.items():
            print(f"\n{name}")
            for step in make(*sizes):
                parts = (step.total, step.work, step.instructions, step.waiting)
                print(
                    "  {:10} {:8.1f} us: work {:.1f}, instructions {:.1f}, waiting {:.1f}".format(
                        step.name, *(p * 1e6 for p in parts)
                    )
                )
    return 0
