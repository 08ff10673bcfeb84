"""The folder of the GPU report: report.md, results.csv, results.json, two plots and the log."""

import dataclasses
import json
import pathlib
import shutil
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench import report
from bench.report import Result

if TYPE_CHECKING:
    from bench.gpu_report import Outcome

# Seconds for the k steps of dpp_map: the model of the design, an H100's latencies added up. Not measured.
MODEL_FLOOR = {(576, 64): 30e-6, (2880, 320): 350e-6, (8192, 640): 700e-6}
MOST_LAUNCHES = 6


@dataclasses.dataclass(frozen=True)
class Goal:
    """A target: at most or at least `wanted`; `measured` is None where the run gave no number."""

    what: str
    wanted: float
    measured: float | None
    unit: str
    at_most: bool

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "NOT MEASURED"
        reached = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return "met" if reached else "NOT MET"


def find(results: Iterable[Result], op: str, shape: tuple[int, int, int], variant: str, width: int) -> Result | None:
    """The row of `shape` = (batch, tokens, keep): of dpp_map on float32 kernels, of the others on bfloat16 tokens."""
    wanted = (op, *shape, width, "float32" if op == "dpp_map" else "bfloat16")
    return next((row for row in results if row.case[:-1] == wanted and row.variant == variant), None)


def goals(results: list[Result], launches: int | None) -> list[Goal]:
    """The targets on an H100, in graphs, with cold L2."""
    found = []

    def at_most(op: str, shape: tuple[int, int, int], width: int, microseconds: float) -> None:
        row = find(results, op, shape, "ours graph", width)
        batch, tokens, keep = shape
        what = f"{op} B{batch} {tokens}/{keep}" + ("" if op == "dpp_map" else f" D{width} bfloat16") + " in a graph"
        found.append(Goal(what, microseconds, row.median * 1e6 if row else None, "us", True))

    def at_least(op: str, width: int, ours: str, theirs: str, factor: float) -> None:
        shape = (1, 576, 64)
        mine, other = find(results, op, shape, ours, width), find(results, op, shape, theirs, width)
        ratio = other.median / mine.median if mine and other else None
        found.append(Goal(f"{op} B1 576/64, {ours}: times faster than {theirs}", factor, ratio, "x", False))

    for batch in (1, 8, 32):
        at_most("dpp_map", (batch, 576, 64), 1024, 60)
    at_most("dpp_map", (1, 2880, 320), 1024, 600)
    at_most("dpp_map", (1, 8192, 640), 1024, 2000)
    at_most("prune", (1, 576, 64), 4096, 150)
    at_most("prune", (5, 576, 32), 4096, 200)
    for op, width in (("dpp_map", 1024), ("prune", 4096)):
        at_least(op, width, "ours", "reference", 40)
        at_least(op, width, "ours graph", "reference graph", 8)
    found.append(Goal("prune B1 576/64: kernel launches", MOST_LAUNCHES, launches, "", True))
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def times_table(results: list[Result]) -> str:
    """One line per case: medians in microseconds, and how many times faster ours is, like against like."""
    cases: dict[tuple, dict[str, Result]] = {}
    for row in results:
        cases.setdefault(row.case, {})[row.variant] = row
    header = ["op", "B", "N", "k", "D", "dtype", "ours", "ours graph", "reference", "in a graph", "compiled"]
    header += ["x eager", "x graph", "floor"]
    rows = []
    for (op, batch, tokens, keep, width, dtype, _), by_variant in cases.items():
        median = {name: row.median for name, row in by_variant.items()}
        line = [op, str(batch), str(tokens), str(keep), str(width), dtype]
        names = ("ours", "ours graph", "reference", "reference graph", "reference compiled")
        line += [microseconds(median.get(name)) for name in names]
        for ours, theirs in (("ours", "reference"), ("ours graph", "reference graph")):
            line.append(f"{median[theirs] / median[ours]:.1f}" if ours in median and theirs in median else "")
        any_row = next(iter(by_variant.values()))
        rows.append([*line, microseconds(max(any_row.flop_floor, any_row.byte_floor))])
    return markdown(header, rows)


def steps_table(steps: list[dict]) -> str:
    header = ["N", "k", "B", "dpp_map us", "mean step us", "late step us", "model of the floor us", "times the floor"]
    rows = []
    for row in steps:
        floor = MODEL_FLOOR[row["tokens"], row["keep"]]
        line = [str(row["tokens"]), str(row["keep"]), str(row["batch"]), microseconds(row["seconds"])]
        line += [microseconds(row["mean step"]), microseconds(row["late step"])]
        rows.append([*line, microseconds(floor), f"{row['seconds'] / floor:.2f}"])
    return markdown(header, rows)


def goals_table(judged: list[Goal]) -> str:
    rows = []
    for goal in judged:
        measured = "" if goal.measured is None else f"{goal.measured:.3g} {goal.unit}"
        rows.append(
            [goal.what, f"{'<=' if goal.at_most else '>='} {goal.wanted:g} {goal.unit}", measured, goal.verdict]
        )
    return markdown(["target (H100)", "wanted", "measured", ""], rows)


def plot_steps(steps: list[dict], device: str, path: pathlib.Path) -> None:
    """Time of a step by size and batch, with the model of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4))
    places = range(len(steps))
    axis.bar([p - 0.2 for p in places], [row["mean step"] * 1e6 for row in steps], 0.4, label="mean step")
    axis.bar([p + 0.2 for p in places], [row["late step"] * 1e6 for row in steps], 0.4, label="step of the second half")
    for place, row in zip(places, steps, strict=True):
        floor = MODEL_FLOOR[row["tokens"], row["keep"]] / row["keep"] * 1e6
        axis.hlines(
            floor, place - 0.42, place + 0.42, color="black", label="model of the floor" if place == 0 else None
        )
    axis.set_xticks(list(places), [f"B{row['batch']}\n{row['tokens']}→{row['keep']}" for row in steps], fontsize=8)
    axis.set_ylabel("us per step")
    axis.set_title(f"dpp_map on {device}, in a graph", loc="left", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def load(work: pathlib.Path, name: str) -> dict:
    path = work / name
    return json.loads(path.read_text()) if path.exists() else {}


def compose(
    outcomes: "list[Outcome]",
    facts: dict[str, str],
    ceilings: dict[str, float],
    steps: dict,
    results: list[Result],
    trouble: list[str],
    seconds: float,
) -> str:
    """The text of report.md. What failed comes first."""
    failed = [outcome for outcome in outcomes if outcome.status != "passed"]
    incomplete = [outcome for outcome in outcomes if outcome.status == "passed" and "no time left" in outcome.detail]
    parts = [f"# GPU report: {facts.get('device', 'unknown device')}\n"]
    parts.append("## Failures\n")
    if not (failed or incomplete or trouble):
        parts.append("None: every part passed.\n")
    for outcome in [*failed, *incomplete]:
        body = outcome.detail.replace("```", "'''")
        parts.append(f"- **{outcome.step.name}** ({outcome.step.purpose}): {outcome.status}\n\n```\n{body}\n```\n")
    parts += [f"- {line}\n" for line in trouble]
    launches = steps.get("launches of prune 576/64/B1 D4096")
    parts.append("## Targets\n\n" + goals_table(goals(results, launches)) + "\n")
    parts.append("## Parts\n")
    rows = [[o.step.name, o.status, f"{o.seconds:.0f}", o.detail.splitlines()[0] if o.detail else ""] for o in outcomes]
    parts.append(markdown(["part", "", "s", ""], rows) + f"\n\n{seconds:.0f} s in all.\n")
    parts.append("## Machine\n\n" + markdown(["", ""], [[name, str(value)] for name, value in facts.items()]) + "\n")
    if ceilings:
        rates = [
            [name, f"{value / 1e12:.3g} TB/s" if "byte" in name else f"{value / 1e12:.3g} Tflop/s"]
            for name, value in ceilings.items()
        ]
        parts.append("## Ceilings reached in this run\n\n" + markdown(["", ""], rates) + "\n")
    if steps.get("steps"):
        parts.append(
            "## Steps of dpp_map\n\nIn a graph. `late step`: the slope between k/2 and k picks. The floor is a model "
            "(latencies added up), not a measurement.\n\n" + steps_table(steps["steps"]) + "\n\n![steps](steps.png)\n"
        )
    if results:
        parts.append(
            "## Times\n\nMedians in microseconds, L2 overwritten before each call, variants in turn. `reference`: what "
            "PyTorch users run (bench/baselines.py, bench/gpu_cases.py). `floor`: the least flops or bytes over the "
            "ceilings above. Percentiles are in results.csv.\n\n" + times_table(results) + "\n\n![times](times.png)\n"
        )
    return "\n".join(parts)


def write(outcomes: "list[Outcome]", work: pathlib.Path, out: pathlib.Path, device: str, seconds: float) -> None:
    """Writes all files; a plot that fails is a line of the report, not the end of it."""
    facts = {"device": device, **load(work, "facts.json")}
    ceilings, steps = load(work, "ceilings.json"), load(work, "steps.json")
    csv = work / "results.csv"
    results = report.read_csv(csv) if csv.exists() else []
    trouble: list[str] = []

    def attempt(what: str, action) -> None:  # type: ignore[no-untyped-def]
        try:
            action()
        except Exception:
            trouble.append(f"{what}: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")

    shown = [row for row in results if row.width == 1024 and (row.dtype == "bfloat16" or row.op == "dpp_map")]
    if shown:
        attempt(
            "times.png", lambda: report.plot(shown, {"date": "", "commit": "", "torch": "", **facts}, out / "times.png")
        )
    if steps.get("steps"):
        attempt("steps.png", lambda: plot_steps(steps["steps"], device, out / "steps.png"))
    judged = goals(results, steps.get("launches of prune 576/64/B1 D4096"))
    record = {
        "facts": facts,
        "parts": [
            {"part": o.step.name, "status": o.status, "seconds": o.seconds, "detail": o.detail} for o in outcomes
        ],
        "targets": [{**dataclasses.asdict(goal), "verdict": goal.verdict} for goal in judged],
        "ceilings": ceilings,
        **steps,
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    if csv.exists():
        shutil.copyfile(csv, out / "results.csv")
    if (work / "log.txt").exists():
        shutil.copyfile(work / "log.txt", out / "log.txt")
    (out / "report.md").write_text(compose(outcomes, facts, ceilings, steps, results, trouble, seconds))
