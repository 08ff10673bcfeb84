"""Compares a run's results.csv with a committed one: python -m bench.compare COMMITTED NEW.

COMMITTED is such a file, or a folder with one folder per run, whose names end in the date: then the newest run of the
same device counts.

A case is slower when its median rose beyond the noise: by more than MINIMUM and by more than three times the half-width
of the wider of the two runs' p20-p80 intervals, both in itself and relative to how much the reference implementations
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


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p20: float
    p80: float

    @property
    def spread(self) -> float:
        """Half the width of the p20-p80 interval, as a share of the median."""
        return (self.p80 - self.p20) / (2 * self.median)


CASE = ("op", "batch", "tokens", "keep", "width", "dtype", "threads", "variant")
Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """The rows of one results.csv."""

    device: str
    times: dict[Key, Timing]


@dataclasses.dataclass(frozen=True)
class Change:
    """A case of both runs. `ratio`: new over old median; `allowed`: what noise can explain."""

    key: Key
    ratio: float
    allowed: float

    def slower(self, drift: float) -> bool:
        return min(self.ratio, self.ratio / drift) > 1 + self.allowed


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What changed. `drift`: the median movement of the references, 1 where there are too few."""

    changes: list[Change]
    missing: list[Key]
    drift: float

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.slower(self.drift)]

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
    times = {
        tuple(row[name] for name in CASE): Timing(float(row["median"]), float(row["p20"]), float(row["p80"]))
        for row in rows
    }
    return Run(devices.pop(), times)


def committed(path: pathlib.Path, device: str) -> Run:
    """The run in the file `path`, or the newest run of the device in the folder `path`; ValueError if there is none."""
    if path.is_file():
        return read(path)
    files = sorted(path.glob("*/results.csv"), key=lambda file: file.parent.name[-len("2026-01-01") :], reverse=True)
    for file in files:
        run = read(file)
        if run.device == device:
            return run
    raise ValueError(f"{path}: no committed results of {device} to compare with; commit a report's folder there")


def is_ours(key: Key) -> bool:
    return key[-1].startswith("ours")


def compare(old: Run, new: Run) -> Comparison:
    """ValueError where the runs are of different devices or share no case of ours."""
    if old.device != new.device:
        raise ValueError(f"device: expected {old.device}, got {new.device}")
    references = [
        new.times[key].median / old.times[key].median for key in old.times if key in new.times and not is_ours(key)
    ]
    drift = statistics.median(references) if len(references) >= LEAST_REFERENCES else 1.0
    changes, missing = [], []
    for key, before in old.times.items():
        if not is_ours(key):
            continue
        if key not in new.times:
            missing.append(key)
            continue
        after = new.times[key]
        allowed = max(MINIMUM, SPREADS * max(before.spread, after.spread))
        changes.append(Change(key, after.median / before.median, allowed))
    if not changes:
        raise ValueError("the runs have no case in common")
    return Comparison(changes, missing, drift)


def describe(key: Key) -> str:
    op, batch, tokens, keep, width, dtype, _, variant = key
    return f"{op} B{batch} {tokens}/{keep} D{width} {dtype}, {variant}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("committed", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        new = read(options.new)
        found = compare(committed(options.committed, new.device), new)
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


if __name__ == "__main__":
    sys.exit(main())
