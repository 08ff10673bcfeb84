"""Builds a program of tests/fuzz, once for all tests: see the Makefile there."""

import os
import pathlib
import shutil
import subprocess

import filelock

ROOT = pathlib.Path(__file__).resolve().parents[1]


def build(goal: str, folder: str, flags: str, compiler: str | None = None) -> pathlib.Path:
    """The program that `make goal` builds, or the folder with several."""
    out = ROOT / "build/fuzz" / folder
    out.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-j2", "-C", str(ROOT / "tests/fuzz"), f"OUT={out}", f"FLAGS={flags}", goal]
    with filelock.FileLock(out / "lock"):  # pytest's processes share the folder
        done = subprocess.run(
            [shutil.which(command[0]) or command[0], *command[1:], f"CXX={compiler or os.environ.get('CXX', 'g++')}"],
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out / goal if (out / goal).exists() else out
