"""The README's rows and plot, and the whole table of bench/results/README.md, from committed runs.

python -m bench figure FIRST.csv AGAIN.csv [--plot docs/speed.png]
"""

import argparse
import csv
import pathlib
from collections.abc import Sequence

from bench.report import milliseconds

Case = tuple[str, int, int, int, int, str]  # op, N, k, B, D, dtype
Medians = dict[str, float]  # variant -> seconds; "flop floor" and "byte floor" beside them

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WIDTH = 1024
README: tuple[Case, ...] = (
    ("prune", 576, 64, 1, WIDTH, "float32"),
    ("prune", 576, 64, 8, WIDTH, "bfloat16"),
    ("prune", 2880, 320, 1, WIDTH, "float32"),
    ("qcsp", 2880, 320, 1, WIDTH, "float32"),
    ("gsp", 2880, 320, 1, WIDTH, "float32"),
    ("dpp_map", 576, 64, 1, WIDTH, "float32"),
)
SIZES = ((576, 64), (2880, 320), (8192, 640))  # of the plot, at B 1 in fp32
OPS = ("qcsp", "dpp_map", "gsp", "prune")


def read(path: pathlib.Path) -> dict[Case, Medians]:
    """The rows of one thread, by case, in the order of the file."""
    found: dict[Case, Medians] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["threads"] != "1":
                continue
            sizes = [int(row[name]) for name in ("tokens", "keep", "batch", "width")]
            case = (row["op"], sizes[0], sizes[1], sizes[2], sizes[3], row["dtype"])
            medians = found.setdefault(case, {})
            medians[row["variant"]] = float(row["median"])
            if row["variant"] == "ours":
                medians["flop floor"] = float(row["flop_floor"])
                medians["byte floor"] = float(row["byte_floor"])
    return found


def floor(medians: Medians) -> float:
    return max(medians["flop floor"], medians["byte floor"])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_rows(first: dict[Case, Medians]) -> str:
    rows = []
    for op, n, k, b, width, dtype in README:
        m = first[op, n, k, b, width, dtype]
        times = [milliseconds(m[name]) for name in ("ours", "eager", "compiled")]
        rows.append(
            [
                f"`{op}`",
                f"{n} → {k}",
                str(b),
                SHORT[dtype],
                *times,
                milliseconds(floor(m)),
                f"{m['eager'] / m['ours']:.1f}",
            ]
        )
    return markdown(["op", "tokens", "images", "dtype", "ours ms", "eager", "compiled", "floor", "times faster"], rows)


def whole_table(first: dict[Case, Medians], again: dict[Case, Medians]) -> str:
    header = ["op", "N/k/B", "D", "dtype", "ours ms", "eager ms", "compiled ms", "NumPy ms", "`torch.bmm` of S ms"]
    header += ["times faster than eager, two runs", "flop floor ms", "byte floor ms", "of floor"]
    rows = []
    for case, m in first.items():
        op, n, k, b, width, dtype = case
        times = [
            milliseconds(m[name]) if name in m else "-" for name in ("ours", "eager", "compiled", "numpy", "bmm of S")
        ]
        ratios = ", ".join(f"{run[case]['eager'] / run[case]['ours']:.1f}" for run in (first, again))
        floors = [milliseconds(m[name]) for name in ("flop floor", "byte floor")]
        what = [op, f"{n}/{k}/B{b}", "-" if op == "dpp_map" else str(width), SHORT[dtype]]
        rows.append([*what, *times, ratios, *floors, f"{floor(m) / m['ours']:.0%}"])
    return markdown(header, rows)


def plot(first: dict[Case, Medians], path: pathlib.Path) -> None:
    """Ours, eager and the floor of each op at three sizes, on a log axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9.0, 2.9), facecolor="white")
    FigureCanvasAgg(figure)
    for axis, op in zip(figure.subplots(1, len(OPS), sharey=True), OPS, strict=True):
        for place, (n, k) in enumerate(SIZES):
            m = first[op, n, k, 1, WIDTH, "float32"]
            ours, eager = m["ours"] * 1e3, m["eager"] * 1e3
            axis.bar(place - 0.2, eager, 0.38, color="#b9bec5", label="eager PyTorch" if place == 0 else None)
            axis.bar(place + 0.2, ours, 0.38, color="#12b5e5", label="script-kernels" if place == 0 else None)
            name = "floor" if place == 0 else None
            axis.hlines(floor(m) * 1e3, place - 0.42, place + 0.42, color="black", lw=1.4, label=name)
            axis.annotate(f"{eager / ours:.0f}x", (place + 0.2, ours), ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(SIZES)), [f"{n}\n→ {k}" for n, k in SIZES], fontsize=8)
        axis.set_yscale("log")
        axis.set_title(op, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench figure", description=__doc__)
    parser.add_argument("first", type=pathlib.Path, help="a baselines-cpu.csv")
    parser.add_argument("again", type=pathlib.Path, help="the same measured once more")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draw the README's plot there")
    arguments = parser.parse_args(argv)
    first, again = read(arguments.first), read(arguments.again)
    print(readme_rows(first), whole_table(first, again), sep="\n\n")
    if arguments.plot:
        plot(first, arguments.plot)
    return 0
