"""Every row of a model's table, each task in a process of its own: what is done is not done again."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lmms

ROOT = Path(__file__).resolve().parents[2]
# The score that a table shows of each task; the CSV has all. MMBench's static form asks no other model for a verdict.
SCORES = {
    "gqa": "exact_match",
    "pope": "pope_f1_score",
    "textvqa_val": "exact_match",
    "mme": "mme_perception_score",
    "mmbench_en_dev_static": "gpt_eval_score",
    "scienceqa_img": "exact_match",
}
METHODS = ("focus", "script", "cdpruner", "divprune", "random")
COLUMNS = (
    "row", "keep", "task", "metric", "score", "share", "samples", "tokens_before", "tokens_after", "device", "versions",
    "date", "void", "pruning",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A model as lmms-eval names it, and how many visual tokens of an image its rows keep."""

    model: str
    model_args: str
    keeps: tuple[str, ...]


PRESETS = {
    "llava-1.5-7b": Preset(
        "llava_hf", "pretrained=llava-hf/llava-1.5-7b-hf,dtype=bfloat16,device_map=cuda", ("192", "128", "64")
    ),
    "llava-next-7b": Preset(
        "llava_hf", "pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,dtype=bfloat16,device_map=cuda", ("640", "320", "160")
    ),
    "qwen2.5-vl-7b": Preset("qwen2_5_vl", "pretrained=Qwen/Qwen2.5-VL-7B-Instruct,device_map=cuda", ("25%", "10%")),
}


@dataclass(frozen=True)
class Row:
    """A method at one budget, or the unpruned model."""

    name: str
    keep: str
    pruning: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One task of a row. The folder's name holds all that its score depends on but the versions."""

    row: Row
    task: str
    arguments: list[str]
    folder: Path

    @property
    def run(self) -> dict[str, Any] | None:
        """What `one` left here, void or not; None where it has not ended."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def done(self) -> bool:
        run = self.run
        return run is not None and not run["void"]

    @property
    def command(self) -> list[str]:
        own = ["--folder", str(self.folder), "--label", self.row.name, "--pruning", json.dumps(self.row.pruning)]
        return [sys.executable, "-m", "bench.accuracy", "one", *own, "--", *self.arguments]


def budget(keep: str) -> dict[str, Any]:
    """`64` tokens of an image, or `25%` of them."""
    return {"keep_ratio": float(keep[:-1]) / 100} if keep.endswith("%") else {"keep": int(keep)}


def make_rows(options: argparse.Namespace, keeps: tuple[str, ...]) -> Iterator[Row]:
    yield Row("unpruned", "all", {})
    common = json.loads(options.common)
    named = [text.partition(":") for text in options.method or METHODS]
    for keep in keeps:
        for method, _, given in named:
            chosen = json.loads(given or "{}")
            name = " ".join([method, *(f"{key}={value}" for key, value in chosen.items())])
            yield Row(name, keep, budget(keep) | common | {"method": method} | chosen)
        if options.calibration:
            yield Row("calibrated", keep, budget(keep) | common | {"calibration": str(options.calibration.absolute())})


def make_cells(rows: list[Row], tasks: list[str], preset: Preset, extra: list[str], out: Path) -> list[Cell]:
    cells = []
    for row in rows:
        stamp = {**row.pruning}
        if "calibration" in stamp:  # by what it says, not by where it lies
            stamp["calibration"] = Path(stamp["calibration"]).read_text()
        for task in tasks:
            arguments = ["--model", preset.model, "--model_args", preset.model_args, "--tasks", task, *extra]
            if "--batch_size" not in extra:
                arguments += ["--batch_size", "1"]
            key = hashlib.sha256(json.dumps([stamp, arguments], sort_keys=True).encode()).hexdigest()[:10]
            words = [row.name, row.keep.replace("%", "pct"), Path(task).stem, key]
            name = "".join(c if c.isalnum() or c in ".=_-" else "-" for c in "-".join(words))
            cells.append(Cell(row, task, arguments, out / name))
    return cells


def score_of(cell: Cell | None) -> tuple[str, float] | None:
    """The metric that stands for a cell's task, and its value; None where the cell is not done."""
    run = cell.run if cell else None
    if cell is None or run is None or run["void"]:
        return None
    scores = run["scores"].get(cell.task) or next(iter(run["scores"].values()))
    known = SCORES.get(cell.task)
    name = known if known is not None and known in scores else str(next(iter(scores)))
    return name, scores[name]


def records(cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """One line per metric of every cell that has run."""
    full = {cell.task: cell for cell in cells if not cell.row.pruning}
    for cell in cells:
        run = cell.run
        if run is None:
            continue
        common = {
            "row": cell.row.name, "keep": cell.row.keep, "task": cell.task, "device": run["device"],
            "samples": sum(run["samples"].values()), "tokens_before": run["seen"]["tokens_before"],
            "tokens_after": run["seen"]["tokens_after"], "date": run["date"], "void": "; ".join(run["void"]),
            "versions": " ".join(f"{k}={v}" for k, v in run["versions"].items()), "pruning": json.dumps(run["pruning"]),
        }  # fmt: skip
        if run["void"]:
            yield common
            continue
        base = full.get(cell.task)
        unpruned = base.run["scores"] if base and base.done and base.run else {}
        for task, scores in run["scores"].items():
            for metric, value in scores.items():
                whole = unpruned.get(task, {}).get(metric)
                yield common | {"task": task, "metric": metric, "score": value, "share": value / whole if whole else ""}


def table(cells: list[Cell], tasks: list[str]) -> str:
    """Markdown: score and share of the unpruned score; empty where nothing has run, "void" where it does not count."""
    found = {(cell.row.name, cell.row.keep, cell.task): cell for cell in cells}
    full = {task: score_of(found.get(("unpruned", "all", task))) for task in tasks}
    metrics = {task: next((s[0] for c in cells if c.task == task and (s := score_of(c))), "") for task in tasks}
    heads = [f"{Path(task).stem} {metrics[task]}".strip() for task in tasks]
    lines = ["| method | keep | " + " | ".join(heads) + " | mean share |", "|---" * (len(tasks) + 3) + "|"]
    for row in dict.fromkeys((cell.row.name, cell.row.keep) for cell in cells):
        entries, shares = [], []
        for task in tasks:
            cell = found[row[0], row[1], task]
            score, whole = score_of(cell), full[task]
            if score is None:
                entries.append("" if cell.run is None else "void")
                continue
            text = f"{score[1]:.4g}"
            if whole is not None and whole[1] and cell.row.pruning:
                shares.append(score[1] / whole[1])
                text += f" ({shares[-1]:.1%})"
            entries.append(text)
        mean = f"{math.fsum(shares) / len(shares):.1%}" if len(shares) == len(tasks) else ""
        lines.append("| " + " | ".join([*row, *entries, mean]) + " |")
    runs = [cell.run for cell in cells if cell.done]
    for what in ("device", "versions"):  # shares compare like with like only where there is one of each
        values = {json.dumps(run[what]) for run in runs if run}
        if len(values) > 1:
            lines.append(f"\n**More than one {what}: {'; '.join(sorted(values))}**")
    return "\n".join(lines) + "\n"


def write(cells: list[Cell], tasks: list[str], out: Path) -> None:
    """Both files whole or not at all: several of these commands may share a folder."""
    part = out / f"table.{os.getpid()}.part"
    part.write_text(table(cells, tasks))
    part.replace(out / "table.md")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(records(cells))
    part.replace(out / "table.csv")


def run_cell(cell: Cell, echo: bool) -> bool:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "run.json").unlink(missing_ok=True)  # void, or it would not run again
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (cell.folder / "log.txt").open("w") as log:
        out = None if echo else log
        subprocess.run(
            cell.command, stdout=out, stderr=out and subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}
        )
    return cell.done


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Preset, list[str]]:
    extra = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=f"{__doc__} What follows -- goes to lmms-eval as it is, such as --limit 8 or --batch_size 4.",
    )
    parser.add_argument("--preset", choices=PRESETS, help="a model with the budgets of the published tables")
    parser.add_argument("--model", help="instead of a preset: the model's name in lmms-eval")
    parser.add_argument("--model-args", help="its arguments there, such as pretrained=PATH,dtype=bfloat16")
    parser.add_argument("--keep", action="append", help="tokens of an image that stay (64), or their share (25%%)")
    parser.add_argument(
        "--method", action="append", metavar="NAME[:JSON]",
        help=f'a method and its options, such as cdpruner:{{"power": 2}}; without any: {", ".join(METHODS)}',
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, help="a row more at each budget, with what calibrate found")
    parser.add_argument(
        "--common", default="{}", help='JSON: arguments of prune_inputs for all rows, such as {"per": "tile"}'
    )
    parser.add_argument("--tasks", default=",".join(SCORES), help="lmms-eval's names, comma-separated (%(default)s)")
    parser.add_argument(
        "--only", help="only rows whose method is this one (to share rows among GPUs); the table shows all"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out/accuracy"), help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left and run none")
    parser.add_argument("--echo", action="store_true", help="lmms-eval's output here, not in each run's log.txt")
    options = parser.parse_args(own)
    if (options.preset is None) == (options.model is None):
        parser.error("--preset, --model: expected exactly one of the two")
    if options.model and not options.keep:
        parser.error("--keep: expected at least one with --model, got none")
    preset = PRESETS[options.preset] if options.preset else Preset(options.model, options.model_args or "", ())
    if options.preset and options.model_args:
        preset = Preset(preset.model, options.model_args, preset.keeps)
    options.out = (options.out / (options.preset or options.model)).absolute()
    try:
        options.rows = list(make_rows(options, tuple(options.keep or preset.keeps)))
        for row in options.rows:
            lmms.check_pruning(row.pruning)
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    if len({(row.name, row.keep) for row in options.rows}) < len(options.rows):
        parser.error("--method, --keep: expected each once, got one twice")
    return options, preset, extra


def main(arguments: list[str]) -> int:
    options, preset, extra = parse(arguments)
    tasks = options.tasks.split(",")
    cells = make_cells(options.rows, tasks, preset, extra, options.out)
    lmms.check_arguments(cells[0].arguments)
    mine = [cell for cell in cells if options.only in (None, cell.row.name.partition(" ")[0])]
    left = [cell for cell in mine if not cell.done]
    print(f"bench.accuracy: {len(mine)} runs, {len(mine) - len(left)} of them done")
    if options.dry_run:
        print("\n".join(shlex.join(cell.command) for cell in left))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    write(cells, tasks, options.out)
    failed = 0
    for i, cell in enumerate(left, start=1):
        print(f"bench.accuracy: {i}/{len(left)} {cell.row.name} {cell.row.keep} {cell.task}", flush=True)
        if not run_cell(cell, options.echo):
            failed += 1
            why = "; ".join(cell.run["void"]) if cell.run else "it did not end"
            print(f"bench.accuracy: void: {why} ({cell.folder / 'log.txt'})", flush=True)
        write(cells, tasks, options.out)
    print((options.out / "table.md").read_text(), end="")
    print(f"bench.accuracy: wrote {options.out / 'table.md'} and table.csv")
    return 1 if failed else 0
