"""The command line: what it prints, and how it refuses."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from script_kernels import cli, info, version

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which the command exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_info_prints_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    facts = info.collect()
    assert len(facts) > 3
    for name, fact in facts.items():
        assert any(line.startswith(name) for line in out.splitlines()), name
        assert fact in out


def test_info_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"script-kernels {version.__version__}\n"


def test_the_message_names_what_the_extra_installs() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^demo = \[(.*)\]$", pyproject, re.MULTILINE)
    wanted = {re.split("[<>=~]", name)[0] for name in re.findall(r'"([^"]+)"', extra)}
    assert wanted == set(cli.DEMO_COMMAND.split()[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep: expected 1 to 576 (the number of patches), got 0"),
        (["--keep", "577"], "--keep: expected 1 to 576 (the number of patches), got 577"),
        (["--grid", "4", "--keep", "17"], "--keep: expected 1 to 16 (the number of patches), got 17"),
        (["--keep", "many"], "argument --keep: invalid int value: 'many'"),
        (["--grid", "1"], "--grid: expected 2 to 96 patches a side, got 1"),
        (["--box", "1,2,3"], "argument --box: expected four whole numbers x,y,w,h, got '1,2,3'"),
        (["--box", "1,2,3,x"], "argument --box: expected four whole numbers x,y,w,h, got '1,2,3,x'"),
        (
            ["--box", "500,0,13,10"],
            "--box: expected x,y,w,h inside the photograph of 512 x 512 pixels, got 500,0,13,10",
        ),
        (["--box=-1,0,10,10"], "--box: expected x,y,w,h inside the photograph of 512 x 512 pixels, got -1,0,10,10"),
        (["--box", "10,10,0,10"], "--box: expected x,y,w,h inside the photograph of 512 x 512 pixels, got 10,10,0,10"),
        (["--output", "picture.jpg"], "--output: expected a .png file in a folder that exists, got picture.jpg"),
        (["--output", "no/such/a.png"], "--output: expected a .png file in a folder that exists, got no/such/a.png"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "demo", *arguments) == f"script-kernels demo: error: {message}"
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_none(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    assert "--image: expected a picture that Pillow reads" in refused(capsys, "demo", "--image", str(text))
    assert "--image: expected a readable picture" in refused(capsys, "demo", "--image", str(tmp_path / "absent.png"))
    assert "--image: expected a readable picture" in refused(capsys, "demo", "--image", str(tmp_path))


def test_a_command_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: command" in refused(capsys)


@pytest.mark.parametrize("missing", ["matplotlib", "skimage"])
def test_a_missing_extra_is_named(missing: str, tmp_path: pathlib.Path) -> None:
    """In a fresh process in which the package cannot be imported."""
    code = f"import sys; sys.modules[{missing!r}] = None; from script_kernels.cli import main; sys.exit(main(['demo']))"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().endswith(f"{missing} is not installed: {cli.DEMO_COMMAND}")
    assert list(tmp_path.iterdir()) == []
