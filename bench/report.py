"""One table on the terminal, the same rows as CSV, and a plot."""

import csv
import dataclasses
import datetime
import math
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

import script_kernels

if TYPE_CHECKING:
    from bench.targets import Target

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """One variant of one op at one shape. Times in seconds."""

    op: str
    batch: int
    tokens: int
    keep: int
    width: int
    dtype: str
    threads: int
    variant: str
    median: float
    p20: float
    p80: float
    rounds: int
    reference: float  # median of the variant that the ratio is taken against, same interleaved run
    flop_floor: float
    byte_floor: float
    floor_from: str  # the product and the copy that the floors stand on, with the rates that they reached

    @property
    def case(self) -> tuple[str, int, int, int, int, str, int]:
        return (self.op, self.batch, self.tokens, self.keep, self.width, self.dtype, self.threads)

    @property
    def ratio(self) -> float:
        """How many times faster than the reference."""
        return self.reference / self.median

    @property
    def floor_share(self) -> float:
        """The larger floor over the median: 1 is as fast as the product or the copy that the floor stands on."""
        return max(self.flop_floor, self.byte_floor) / self.median


CSV_FIELDS = [field.name for field in dataclasses.fields(Result)] + ["ratio", "floor_share"]


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to know to believe a number. COMMIT names the commit where git cannot."""
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "script-kernels": script_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.system() + " " + platform.machine(),
    }
    if device.type == "cuda":
        import triton

        facts |= {"cuda": torch.version.cuda or "none", "triton": triton.__version__}
    return facts


def cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def milliseconds(seconds: float) -> str:
    """Three digits, never in scientific notation."""
    value = seconds * 1e3
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 5)}f}"


def layout(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest entry; numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    """One line per op and shape: ours with its quantiles, the others' medians, the floors, the ratio; then what the
    floors stand on."""
    others = [name for name in dict.fromkeys(result.variant for result in results) if name != "ours"]
    header = ["op", "N/k/B", "D", "dtype", "threads", "ours ms", "p20", "p80", *others]
    header += ["flop floor", "byte floor", "x faster", "of floor"]
    by_case: dict[tuple, dict[str, Result]] = {}
    for result in results:
        by_case.setdefault(result.case, {})[result.variant] = result
    rows = []
    for found in by_case.values():
        r = found["ours"]
        row = [r.op, f"{r.tokens}/{r.keep}/B{r.batch}", str(r.width), r.dtype, str(r.threads)]
        row += [milliseconds(seconds) for seconds in (r.median, r.p20, r.p80)]
        row += [milliseconds(found[name].median) if name in found else "-" for name in others]
        row += [milliseconds(r.flop_floor), milliseconds(r.byte_floor)]
        rows.append([*row, f"{r.ratio:.2f}", f"{r.floor_share:.0%}"])
    origins = dict.fromkeys(f"threads {result.threads}: {result.floor_from}" for result in results)
    return "\n".join(
        [layout(header, rows), "", "Floors: an op's least work at the rates that these reached:", *origins]
    )


def target_table(targets: "list[Target]") -> str:
    rows = [
        [t.what, ("<= " if t.at_most else ">= ") + f"{t.wanted:g}", f"{t.measured:.2f}", "met" if t.met else "NOT MET"]
        for t in targets
    ]
    return layout(["target", "wanted", "measured", ""], rows)


def write_rows(header: Iterable[str], rows: Iterable[Iterable[Any]], facts: dict[str, str], path: pathlib.Path) -> None:
    """The rows as CSV; the facts of the run stand in each, so that rows of several runs can be put together.

    The file is whole at every moment, so that a run which is cut leaves what it had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, *facts])
        writer.writerows([*row, *facts.values()] for row in rows)
    unfinished.replace(path)


def write_csv(results: list[Result], facts: dict[str, str], path: pathlib.Path) -> None:
    write_rows(CSV_FIELDS, ([getattr(result, name) for name in CSV_FIELDS] for result in results), facts, path)


def read_csv(path: pathlib.Path) -> list[Result]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {field.name: field.type for field in dataclasses.fields(Result)}
    return [Result(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]  # type: ignore[operator]


def plot(results: list[Result], facts: dict[str, str], path: pathlib.Path) -> None:
    """One panel per op: the time of every variant at each shape, on a log axis, with the floor as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(result.op for result in results))
    variants = list(dict.fromkeys(result.variant for result in results))
    most = max(len({result.case for result in results if result.op == op}) for op in ops)
    figure = Figure((max(11, 0.8 * most), 2.8 * len(ops) + 0.8))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ops), 1, squeeze=False)
    for axis, op in zip(axes[:, 0], ops, strict=True):
        mine = [result for result in results if result.op == op]
        cases = list(dict.fromkeys(result.case for result in mine))
        width = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            chosen = [result for result in mine if result.variant == variant]
            if not chosen:
                continue
            places = [cases.index(result.case) + (i - (len(variants) - 1) / 2) * width for result in chosen]
            medians = [result.median * 1e3 for result in chosen]
            below = [(result.median - result.p20) * 1e3 for result in chosen]
            above = [(result.p80 - result.median) * 1e3 for result in chosen]
            axis.bar(places, medians, width, yerr=[below, above], label=variant, color=f"C{i}", error_kw={"lw": 0.8})
        for place, case in enumerate(cases):
            first = next(result for result in mine if result.case == case)
            floor = max(first.flop_floor, first.byte_floor) * 1e3
            axis.hlines(floor, place - 0.42, place + 0.42, color="black", lw=1.2, label="floor" if place == 0 else None)
        labels = [f"B{c[1]} {c[2]}→{c[3]}\nD{c[4]} {c[5]} {c[6]}t" for c in cases]
        axis.set_xticks(range(len(cases)), labels, fontsize=6.5)
        axis.set_yscale("log")
        axis.set_ylabel("ms (p20 to p80)")
        axis.set_title(op, loc="left", fontsize=10)
        axis.legend(fontsize=7, ncols=3)
    head = (
        f"{facts['device']}, {facts['date']}, commit {facts['commit']}, torch {facts['torch']}; floor: least work over "
    )
    figure.suptitle(head + "this run's best product or copy", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
