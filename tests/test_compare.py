"""bench.compare on results recorded on one CPU: a quiet run and one beside heavy work, which slowed everything."""

import csv
import pathlib
import shutil
from collections.abc import Callable

import pytest

from bench import compare

RECORDED = pathlib.Path(__file__).parent / "recorded"
FIRST, SECOND = RECORDED / "first_run.csv", RECORDED / "second_run.csv"
Row = dict[str, str]


def changed(path: pathlib.Path, edit: Callable[[Row], Row | None], source: pathlib.Path = FIRST) -> pathlib.Path:
    """A copy of the recorded run with each row edited, or left out where `edit` returns None."""
    with source.open(newline="") as file:
        rows = [edited for row in csv.DictReader(file) if (edited := edit(row)) is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def scaled(row: Row, factor: float) -> Row:
    return row | {name: str(float(row[name]) * factor) for name in ("median", "p20", "p80")}


def is_case(row: Row, op: str, batch: str, variant: str) -> bool:
    return (row["op"], row["batch"], row["variant"]) == (op, batch, variant)


def test_a_run_passes_against_itself() -> None:
    found = compare.compare(compare.read(FIRST), compare.read(FIRST))
    assert found.passed
    assert found.drift == 1.0
    assert len(found.changes) == 8
    assert all(change.ratio == 1.0 for change in found.changes)


def test_a_machine_that_slowed_everybody_is_no_regression(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare.compare(compare.read(FIRST), compare.read(SECOND))
    assert found.drift > 1.5
    assert all(change.ratio > 1.05 for change in found.changes), "every case was slower than before"
    assert compare.main([str(FIRST), str(SECOND)]) == 0
    assert "8 cases; the references moved by +1" in capsys.readouterr().out


def test_one_slower_case_fails_and_is_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 1.3 if is_case(row, "gsp", "2", "ours") else 1.0))
    assert compare.main([str(FIRST), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "SLOWER  gsp B2 49/6 D32 float32 1t, ours: +30.0%, noise explains 5.0%" in printed
    assert "1 slower, 0 missing" in printed


def test_a_slower_case_on_a_slower_machine_fails(tmp_path: pathlib.Path) -> None:
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 2.0 * (1.3 if is_case(row, "gsp", "2", "ours") else 1)))
    found = compare.compare(compare.read(FIRST), compare.read(new))
    assert found.drift == pytest.approx(2.0)
    assert [change.key[0] for change in found.slower] == ["gsp"]


def test_what_the_spread_explains_is_no_regression(tmp_path: pathlib.Path) -> None:
    """gsp at batch 1 was recorded with a p20-p80 interval 14 % wide: 20 % more is within three half-widths."""
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 1.2 if is_case(row, "gsp", "1", "ours") else 1.0))
    assert compare.main([str(FIRST), str(new)]) == 0
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 1.3 if is_case(row, "gsp", "1", "ours") else 1.0))
    assert compare.main([str(FIRST), str(new)]) == 1


def test_a_faster_case_passes_and_is_counted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 0.5 if row["variant"] == "ours" else 1.0))
    assert compare.main([str(FIRST), str(new)]) == 0
    assert "8 faster" in capsys.readouterr().out


def test_a_faster_reference_does_not_make_ours_slower(tmp_path: pathlib.Path) -> None:
    new = changed(tmp_path / "new.csv", lambda row: scaled(row, 0.5 if row["variant"] == "reference" else 1.0))
    assert compare.main([str(FIRST), str(new)]) == 0


def test_a_missing_case_fails(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = changed(tmp_path / "new.csv", lambda row: None if is_case(row, "prune", "2", "ours") else row)
    assert compare.main([str(FIRST), str(new)]) == 1
    assert "MISSING prune B2 49/6 D32 float32 1t, ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row: row | {"device": "another"}, "device: expected AMD EPYC, got another"),
        (lambda row: row | {"device": row["op"]}, "expected rows of one device"),
        (lambda row: row | {"width": "64"}, "no case in common"),
    ],
)
def test_runs_that_cannot_be_compared(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], edit: Callable[[Row], Row], message: str
) -> None:
    assert compare.main([str(FIRST), str(changed(tmp_path / "new.csv", edit))]) == 2
    assert message in capsys.readouterr().err


def test_of_a_folder_the_newest_run_of_the_device_counts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cpu-b-2026-01-05", "cpu-a-2026-02-01"):
        (tmp_path / name).mkdir()
        shutil.copyfile(FIRST, tmp_path / name / "results.csv")
    # The newest run of all is another device's, the oldest is twice as fast.
    changed(tmp_path / "other-2026-03-01" / "results.csv", lambda row: row | {"device": "another"})
    changed(tmp_path / "cpu-z-2025-12-31" / "results.csv", lambda row: scaled(row, 0.5))
    # Another run's file of the same day.
    changed(tmp_path / "cpu-a-2026-02-01" / "others.csv", lambda row: scaled(row, 0.5))
    assert compare.committed(tmp_path, "results.csv", "AMD EPYC") == compare.read(FIRST)
    same = shutil.copyfile(FIRST, tmp_path / "results.csv")
    assert compare.main([str(tmp_path), str(same)]) == 0
    changed(same, lambda row: row | {"device": "a third"})
    assert compare.main([str(tmp_path), str(same)]) == 2
    assert "no committed results.csv of a third" in capsys.readouterr().err
