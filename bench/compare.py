"""python -m bench compare COMMITTED NEW: a run's CSV against a committed one.

COMMITTED is such a file, or a folder with one folder per run, whose names end in the date: then the newest run of the
same device counts, in the file that is named like NEW.

A case is slower when its median rose beyond the noise: by more than MINIMUM and by more than three times the half-width
of the wider of the two runs' p20-p80 intervals, both in itself and relative to how much the other implementations
moved between the runs (a machine that is slower for everybody is no regression of ours). Exit status: 1 if a case is
slower or missing, 2 if the files cannot be compared (other device, nothing in common).
"""

import argparse
import csv
import dataclasses
import pathlib
import statistics
import sys

MINIMUM = 0.05
SPREADS = 3.0
# Enough references to call their movement the machine's.
LEAST_REFERENCES = 3
CASE = ("op", "batch", "tokens", "keep", "width", "dtype", "threads", "variant")
Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """The rows of one CSV: per case the median in seconds, and half its p20-p80 interval as a share of the median."""

    device: str
    medians: dict[Key, float]
    spreads: dict[Key, float]


@dataclasses.dataclass(frozen=True)
class Change:
    """A case of both runs. `ratio`: new over old median; `allowed`: what noise can explain."""

    key: Key
    ratio: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What changed. `drift`: the median movement of the references, 1 where there are too few."""

    changes: list[Change]
    missing: list[Key]
    drift: float

    @property
    def slower(self) -> list[Change]:
        return [c for c in self.changes if min(c.ratio, c.ratio / self.drift) > 1 + c.allowed]

    @property
    def passed(self) -> bool:
        return not self.slower and not self.missing


def read(path: pathlib.Path) -> Run:
    """ValueError where the file is empty or mixes devices."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    devices = {row["device"] for row in rows}
    if len(devices) != 1:
        raise ValueError(f"{path}: expected rows of one device, got {sorted(devices)}")
    keyed = {tuple(row[name] for name in CASE): row for row in rows}
    medians = {key: float(row["median"]) for key, row in keyed.items()}
    widths = {key: float(row["p80"]) - float(row["p20"]) for key, row in keyed.items()}
    return Run(devices.pop(), medians, {key: width / (2 * medians[key]) for key, width in widths.items()})


def committed(path: pathlib.Path, name: str, device: str) -> Run:
    """The run in the file `path`, or of the folder `path` the device's newest called `name`; ValueError without one."""
    if path.is_file():
        return read(path)
    for file in sorted(path.glob(f"*/{name}"), key=lambda f: f.parent.name[-len("2026-01-01") :], reverse=True):
        run = read(file)
        if run.device == device:
            return run
    raise ValueError(f"{path}: no committed {name} of {device} to compare with; commit a report's folder there")


def compare(old: Run, new: Run) -> Comparison:
    """ValueError where the runs are of different devices or share no case of ours."""
    if old.device != new.device:
        raise ValueError(f"device: expected {old.device}, got {new.device}")
    ratios = {key: new.medians[key] / old.medians[key] for key in old.medians if key in new.medians}
    ours = {key for key in old.medians if key[-1].startswith("ours")}
    references = [ratio for key, ratio in ratios.items() if key not in ours]
    changes = [
        Change(key, ratio, max(MINIMUM, SPREADS * max(old.spreads[key], new.spreads[key])))
        for key, ratio in ratios.items()
        if key in ours
    ]
    if not changes:
        raise ValueError("the runs have no case in common")
    drift = statistics.median(references) if len(references) >= LEAST_REFERENCES else 1.0
    return Comparison(changes, [key for key in old.medians if key in ours and key not in ratios], drift)


def describe(key: Key) -> str:
    op, batch, tokens, keep, width, dtype, threads, variant = key
    return f"{op} B{batch} {tokens}/{keep} D{width} {dtype} {threads}t, {variant}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("committed", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        new = read(options.new)
        found = compare(committed(options.committed, options.new.name, new.device), new)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(f"{len(found.changes)} cases; the references moved by {found.drift - 1:+.1%}")
    for change in sorted(found.slower, key=lambda change: -change.ratio):
        print(f"SLOWER  {describe(change.key)}: {change.ratio - 1:+.1%}, noise explains {change.allowed:.1%}")
    for key in found.missing:
        print(f"MISSING {describe(key)}")
    faster = sum(change.ratio < 1 - change.allowed for change in found.changes)
    print(f"{len(found.slower)} slower, {len(found.missing)} missing, {faster} faster, beyond noise")
    return 0 if found.passed else 1
