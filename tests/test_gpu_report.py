"""tools/gpu without a GPU: the dry run; with stand-ins for Python and CUDA's tools, parts that pass, fail or hang."""

import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench import run

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ["facts", "cache", "build", "tests", "memcheck", "racecheck", "synccheck", "bench", "prefill", "compare"]

# Stands in for python3: a GPU of sm_90, parts that do as $ACT says.
PYTHON = """#!/bin/bash
case "$*" in
  *capability*) echo "a warning"; echo "90 stand-in" ;;
  *"import transformers"* | *"from transformers"*) echo "$TRANSFORMERS"; [ -z "$TRANSFORMERS" ] ;;
  *"import xdist"*) exit 1 ;;
  *setup.py*) echo "nvcc: error"; exit "${BUILD:-0}" ;;
  *"pytest -v"*)
    [ -z "$HANG" ] && exit 0
    [ "$HANG" = deaf ] && trap '' INT TERM
    echo "test_one PASSED"
    (trap '' INT TERM; exec sleep 97531) &
    echo $! >"$HANG_PID"
    for _ in $(seq 100); do sleep 1; done ;;
  *"bench run"*) echo rows >"${!#}/baselines-cuda.csv" ;;
  *) echo "$*" ;;
esac
"""


def tool(tmp_path: pathlib.Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """The command and its environment, with the stand-ins first in PATH."""
    folder = tmp_path / "stand-ins"
    folder.mkdir(exist_ok=True)
    for name, text in {"python3": PYTHON, "nvidia-smi": "#!/bin/sh\n", "compute-sanitizer": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHON")}
    paths = {"PATH": f"{folder}:{inherited['PATH']}", "HANG_PID": str(tmp_path / "pid"), "GRACE": "1"}
    return [str(ROOT / "tools" / "gpu"), *arguments], inherited | paths | variables


def finish(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=120)


def statuses(folder: pathlib.Path) -> dict[str, str]:
    """Part -> status, from the table."""
    lines = [re.split(r"\s{2,}", line) for line in (folder / "status.txt").read_text().splitlines()]
    return {line[0]: line[1] for line in lines}


def gone(pid: int) -> bool:
    """Whether the process ends within a moment, or has ended and nobody has read its status."""
    for _ in range(50):
        stat = pathlib.Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("way", ["script", "make"])
def test_dry_run_lists_every_part_and_runs_none(way: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    command, environment = tool(tmp_path, "--dry-run", "--out", str(out))
    if way == "make":
        command = ["make", "-s", "-C", str(ROOT), "gpu-report", f"OUT={out}", "GPU_ARGS=--dry-run"]
    done = finish(command, environment)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[0] != " "] == PARTS
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written_and_the_status_says_so(tmp_path: pathlib.Path) -> None:
    arguments = ("--out", str(tmp_path / "out"))
    done = finish(*tool(tmp_path, *arguments, PYTHON=sys.executable))
    assert done.returncode == 1
    assert re.fullmatch(
        r"gpu-report: nothing was measured: torch \S+ (is built without|finds no) CUDA.*\n", done.stderr
    )
    done = finish(*tool(tmp_path, *arguments, PYTHON="/no/python"))
    assert (done.returncode, done.stderr) == (1, "gpu-report: nothing was measured: /no/python does not run\n")
    assert not (tmp_path / "out").exists()
    done = finish(*tool(tmp_path, "--dry-run", PYTHON=sys.executable))
    assert (done.returncode, done.stdout.startswith("no GPU here: torch ")) == (0, True)


def test_every_part_runs_something_that_exists(tmp_path: pathlib.Path) -> None:
    done = finish(*tool(tmp_path, "--dry-run"))
    commands = [line.split() for line in done.stdout.splitlines() if line[0] == " "]
    assert len(commands) == len(PARTS) - 1, "no run of a GPU is committed, so compare is skipped"
    modules = [command[command.index("-m") + 1] for command in commands if "-m" in command]
    assert {"script_kernels.targets", "pytest", "bench"} == set(modules)
    assert all(importlib.util.find_spec(module) for module in modules)
    for command in commands:
        assert all((ROOT / word).exists() for word in command if word.endswith(".py")), command
        if command[1:4] == ["-m", "bench", "run"]:
            assert run.parse_arguments(command[4:]).device.type == "cuda"
        if "script_kernels.targets" in command:
            from script_kernels import targets

            assert command[command.index("--target") + 1] in targets.TARGETS


def test_all_parts_pass(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    done = finish(*tool(tmp_path, "--out", str(out)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(out) == dict.fromkeys(PARTS, "passed") | {"compare": "skipped"}
    assert (out / "baselines-cuda.csv").read_text() == "rows\n"
    assert (out / "cache.log").read_text().splitlines()[1].startswith("-m script_kernels.targets --target sm_90")
    assert done.stdout.endswith("every part passed or was skipped\n")


@pytest.mark.parametrize("hang", ["gentle", "deaf"])
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(hang: str, tmp_path: pathlib.Path) -> None:
    """The hanging part leaves a process behind that no signal but the last one ends."""
    out = tmp_path / "out"
    reason = "needs transformers >= 5.18, here is 4.57.1"
    variables = {"BUILD": "3", "HANG": hang, "LIMIT": "2", "TRANSFORMERS": reason}
    done = finish(*tool(tmp_path, "--out", str(out), **variables))
    assert done.returncode == 1
    expected = {"build": "FAILED (3)", "tests": "CUT at 2 s", "prefill": "skipped", "compare": "skipped"}
    assert statuses(out) == dict.fromkeys(PARTS, "passed") | expected
    assert reason in (out / "status.txt").read_text()
    assert "    nvcc: error\n" in done.stdout, "the end of a failed part's log is shown"
    assert (out / "tests.log").read_text().endswith("test_one PASSED\n")
    assert done.stdout.endswith("failed: build tests\n")
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_part_killed_before_its_limit_failed(tmp_path: pathlib.Path) -> None:
    command, environment = tool(tmp_path, "--out", str(tmp_path / "out"), "facts")
    (tmp_path / "stand-ins" / "nvidia-smi").write_text("#!/bin/sh\nkill -KILL $$\n")
    assert finish(command, environment).returncode == 1
    assert statuses(tmp_path / "out") == {"facts": "FAILED (137)"}


def test_an_interrupt_ends_the_part_and_keeps_the_table(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    command, environment = tool(tmp_path, "--out", str(out), "facts", "tests", "bench", HANG="deaf")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 130
    first, last = (out / "status.txt").read_text().splitlines()
    assert (first.split()[:2], last) == (["facts", "passed"], "interrupted")
    assert gone(int((tmp_path / "pid").read_text()))


def test_only_named_parts_run_and_unknown_ones_are_refused(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    done = finish(*tool(tmp_path, "--out", str(out), "facts", "bench"))
    assert done.returncode == 0
    assert statuses(out) == {"facts": "passed", "bench": "passed"}
    done = finish(*tool(tmp_path, "--out", str(out), "benchmark"))
    assert done.returncode == 2
    assert "got benchmark" in done.stderr


def test_the_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(ROOT / "tools" / "gpu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
