"""The PTX of the Triton kernels, interpreted: a cheap part of `make gpu-proof`, see tests/ptx/ and docs/gpu.md.

In a process of its own: Triton's interpreter, which other tests turn on, stands in the way of its compiler.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_proofs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = [
        "-c",
        "tests/ptx/pytest.ini",
        "--rootdir",
        "tests/ptx",
        "--confcutdir",
        "tests/ptx",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "-m", "not slow", "tests/ptx"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
