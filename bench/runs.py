"""What a run is made of: the variants of a case, timed after its gate, and the targets that the CPU path set itself."""

import sys
from collections.abc import Callable, Iterable

import torch

from bench import baselines, memory, timing
from bench.cases import Case, Inputs, Row, make_case
from bench.report import Result, Target


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def oracle_variants(case: Case) -> dict[str, timing.Variant]:
    """Ours and script_kernels.reference, which is written to be read: a lower bound on what PyTorch code can do."""
    return {"ours": case.ours, "reference": case.oracle}


def baseline_variants(case: Case, compile_too: bool) -> dict[str, timing.Variant]:
    """Ours, the eager baseline, the same compiled, NumPy, and torch.bmm of S alone."""
    inputs = case.inputs
    arguments = case.arguments
    if case.op == "prune":
        arguments = (*arguments, inputs.ranks, inputs.survivors)
    variants: dict[str, timing.Variant] = {"ours": case.ours, "eager": bind(getattr(baselines, case.op), *arguments)}
    if compile_too:
        variants["compiled"] = bind(getattr(baselines.Compiled(), case.op), *arguments)
    if case.op == "qcsp":
        tokens, relevance = inputs.tokens.float().numpy(), inputs.relevance.numpy()
        variants["numpy"] = bind(baselines.numpy_qcsp, tokens, relevance, inputs.row.keep)
    if case.op == "dpp_map":
        variants["numpy"] = bind(baselines.numpy_dpp_map, inputs.kernel.numpy(), inputs.row.keep)
    else:
        variants["bmm of S"] = bind(torch.bmm, inputs.tokens, inputs.tokens.mT)
    return variants


def bind(function: Callable, *arguments: object) -> timing.Variant:
    return lambda: function(*arguments)


def measure(
    shapes: Iterable[Inputs],
    ops: Iterable[str],
    variants_of: Callable[[Case], dict[str, timing.Variant]],
    reference_name: str,
    peaks: timing.Peaks,
    seconds: float,
) -> list[Result]:
    """Gate, then time, every op at every shape. AssertionError from a gate ends the run."""
    results = []
    ops = list(ops)
    for inputs in shapes:
        row = inputs.row
        dtype = str(inputs.dtype).removeprefix("torch.")
        for op in ops:
            # A ready kernel is float32 and N x N: width and dtype of the tokens change nothing about it.
            if op == "dpp_map" and (inputs.dtype != torch.float32 or inputs.width > 1024):
                continue
            case = make_case(op, inputs)
            say(f"{op} {row.name} D{inputs.width} {dtype} threads {torch.get_num_threads()}")
            case.gate()
            variants = variants_of(case)
            timings = timing.interleave(variants, inputs.device, seconds=seconds)
            flop_floor, byte_floor = peaks.floor(case.work.flops, case.work.bytes, inputs.dtype)
            for name, found in timings.items():
                results.append(
                    Result(
                        op=op,
                        batch=row.batch,
                        tokens=row.tokens,
                        keep=row.keep,
                        width=inputs.width,
                        dtype=dtype,
                        threads=torch.get_num_threads(),
                        variant=name,
                        median=found.median,
                        p20=found.p20,
                        p80=found.p80,
                        rounds=found.rounds,
                        reference=timings[reference_name].median,
                        flop_floor=flop_floor,
                        byte_floor=byte_floor,
                    )
                )
    return results


# Times faster than the eager baseline, one thread, D 1024, in the order of cases.ROWS.
WANTED = {
    ("qcsp", "float32"): (8.0, 6.0, 4.0, 9.0, 11.0),
    ("dpp_map", "float32"): (35.0, 12.0, 12.0, 8.0, 6.5),
    ("prune", "float32"): (4.0, 2.5, 2.5, 2.5, 4.0),
    ("prune", "bfloat16"): (6.0, 3.75, 3.75, 3.75, 6.0),
}
GSP_FLOOR = 1.5
BEATS_BMM = (Row(1, 2880, 320), Row(1, 8192, 640))


def speed_targets(results: list[Result], rows: tuple[Row, ...]) -> list[Target]:
    """The targets that these results can judge."""
    targets = []

    def find(op: str, dtype: str, row: Row, variant: str) -> Result | None:
        key = (op, row.batch, row.tokens, row.keep, 1024, dtype, 1, variant)
        return next((result for result in results if (*result.case, result.variant) == key), None)

    for (op, dtype), wanted in WANTED.items():
        for row, factor in zip(rows, wanted, strict=True):
            ours = find(op, dtype, row, "ours")
            if ours:
                targets.append(Target(f"{op} {row.name} {dtype}: times faster than eager", factor, ours.ratio))
    for row in rows:
        ours = find("gsp", "float32", row, "ours")
        if ours:
            share = ours.median / ours.flop_floor
            targets.append(Target(f"gsp {row.name} float32: times its flop floor", GSP_FLOOR, share, at_most=True))
    for row in BEATS_BMM:
        ours, product = find("prune", "float32", row, "ours"), find("prune", "float32", row, "bmm of S")
        if ours and product:
            share = ours.median / product.median
            targets.append(Target(f"prune {row.name} float32: share of torch.bmm of S", 1.0, share, at_most=True))
    return targets


MEMORY_TOKENS = (8192, 32768)


def measure_memory(ops: Iterable[str], width: int = 1024, keep: int = 640) -> tuple[list[list[str]], list[Target]]:
    """Rows (op, variant, N, MiB, share of an N x N float32 matrix); targets: linear growth, no N x N allocation."""
    rows, targets = [], []
    small, large = MEMORY_TOKENS
    for op in ops:
        if op not in ("qcsp", "gsp", "prune"):
            continue
        peak = {}
        for count in MEMORY_TOKENS:
            # The baseline is measured at the small size only: at the large one it needs several times 4 GiB.
            for variant in ("ours", "eager") if count == small else ("ours",):
                say(f"memory of {op}, {variant}, N = {count}")
                held = memory.measure(op, variant, count, keep, width)
                rows.append([op, variant, str(count), f"{held / 2**20:.0f}", f"{held / (4 * count**2):.2f}"])
                peak[variant, count] = held
        growth = peak["ours", large] / peak["ours", small]
        targets.append(Target(f"{op}: peak memory at N {large} over N {small} (4 linear, 16 square)", 6, growth, True))
        share = peak["ours", large] / (4 * large**2)
        targets.append(Target(f"{op}: peak memory at N {large}, share of an N x N matrix", 0.25, share, True))
    return rows, targets
