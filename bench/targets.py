"""The figures that the project set itself, and what a run's rows say of them."""

import dataclasses

from bench.cases import ROWS, Row
from bench.report import Result


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure to reach: at least `wanted`, or at most."""

    what: str
    wanted: float
    measured: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


# Times faster than the eager baseline, one thread, D 1024, in the order of cases.ROWS.
FASTER = {
    ("qcsp", "float32"): (8.0, 6.0, 4.0, 9.0, 11.0),
    ("dpp_map", "float32"): (35.0, 12.0, 12.0, 8.0, 6.5),
    ("prune", "float32"): (4.0, 2.5, 2.5, 2.5, 4.0),
    ("prune", "bfloat16"): (6.0, 3.75, 3.75, 3.75, 6.0),
}
GSP_FLOOR = 1.5
NO_QUERY_FLOOR = 1.5  # qcsp and prune without a query, whose floor counts every token against every pick
BEATS_BMM = (Row(1, 2880, 320), Row(1, 8192, 640))

ONE = Row(1, 576, 64)
# An H100, in a graph, L2 overwritten before: (op, row, D, dtype) -> microseconds. A ready kernel is float32.
MICROSECONDS: dict[tuple[str, Row, int, str], float] = {
    **{("dpp_map", Row(batch, 576, 64), 1024, "float32"): 60 for batch in (1, 8, 32)},
    ("dpp_map", Row(1, 2880, 320), 1024, "float32"): 600,
    ("dpp_map", Row(1, 8192, 640), 1024, "float32"): 2000,
    ("prune", ONE, 4096, "bfloat16"): 140,
    ("prune", Row(1, 2880, 320), 4096, "bfloat16"): 1100,
    ("prune", Row(5, 576, 32), 4096, "bfloat16"): 200,
}
FASTER_ON_GPU = {
    ("dpp_map", 1024, "float32"): (40.0, 8.0),
    ("prune", 4096, "bfloat16"): (40.0, 8.0),
}  # eagerly, in graphs


def judge(results: list[Result], gpu: bool = False) -> list[Target]:
    """The targets that these rows can judge."""
    rows = {(*row.case[:-1], row.variant): row for row in results if gpu or row.threads == 1}

    def find(op: str, row: Row, width: int, dtype: str, variant: str) -> Result | None:
        return rows.get((op, row.batch, row.tokens, row.keep, width, dtype, variant))

    found = []
    if gpu:
        for (op, row, width, dtype), most in MICROSECONDS.items():
            ours = find(op, row, width, dtype, "ours graph")
            if ours:
                what = f"H100: {op} {row.name} D{width} {dtype} in a graph: us"
                found.append(Target(what, most, ours.median * 1e6, at_most=True))
        for (op, width, dtype), factors in FASTER_ON_GPU.items():
            for suffix, factor in zip(("", " graph"), factors, strict=True):
                ours, eager = (find(op, ONE, width, dtype, name + suffix) for name in ("ours", "eager"))
                if ours and eager:
                    what = f"H100: {op} {ONE.name} D{width}, ours{suffix}: times faster than eager{suffix}"
                    found.append(Target(what, factor, eager.median / ours.median))
        return found

    for (op, dtype), wanted_by_row in FASTER.items():
        for row, factor in zip(ROWS, wanted_by_row, strict=True):
            ours, eager = (find(op, row, 1024, dtype, name) for name in ("ours", "eager"))
            if ours and eager:
                what = f"{op} {row.name} {dtype}: times faster than eager"
                found.append(Target(what, factor, eager.median / ours.median))
    for row in ROWS:
        ours = find("gsp", row, 1024, "float32", "ours")
        if ours:
            share = ours.median / ours.flop_floor
            found.append(Target(f"gsp {row.name} float32: times its flop floor", GSP_FLOOR, share, at_most=True))
    for row in BEATS_BMM:
        ours, product = (find("prune", row, 1024, "float32", name) for name in ("ours", "bmm of S"))
        if ours and product:
            share = ours.median / product.median
            found.append(Target(f"prune {row.name} float32: share of torch.bmm of S", 1.0, share, at_most=True))
    return found


def judge_no_query(results: list[Result]) -> list[Target]:
    """Of rows without a query, whatever the tokens: one thread, fp32."""
    return [
        Target(f"{r.op} {Row(r.batch, r.tokens, r.keep).name}: times its flop floor", NO_QUERY_FLOOR, 1 / share, True)
        for r in results
        if (r.variant, r.threads, r.width, r.dtype) == ("ours", 1, 1024, "float32")
        and r.op in ("qcsp", "prune")
        and r.tokens >= 2880
        and (share := r.flop_floor / r.median)
    ]


def memory_targets(op: str, small: tuple[int, int], large: tuple[int, int]) -> list[Target]:
    """(N, bytes) of ours at two sizes: linear growth, no N x N allocation."""
    growth = large[1] / small[1]
    share = large[1] / (4 * large[0] ** 2)
    return [
        Target(f"{op}: peak memory at N {large[0]} over N {small[0]} (4 linear, 16 square)", 6, growth, True),
        Target(f"{op}: peak memory at N {large[0]}, share of an N x N matrix", 0.25, share, True),
    ]
