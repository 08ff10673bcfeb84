"""Every kernel of every launch table compiled, in processes where Triton compiles: other tests may have turned its
interpreter on."""

import os
import subprocess
import sys
from pathlib import Path

from script_kernels import targets

ROOT = Path(targets.__file__).parents[1]


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def assert_all_compile(chosen):
    """Every kernel compiles for every one of the targets, and fits."""
    done = run("-m", "script_kernels.targets", *(f"--target={name}" for name in chosen))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    *lines, total = done.stdout.splitlines()[1:]
    assert total == f"{len(lines)} binaries, 0 with problems"
    rows = [line.rsplit(maxsplit=6) for line in lines]
    kernels = {kernel for _, kernel, *_ in rows}
    for kernel in kernels:
        assert {target for _, k, target, *_ in rows if k == kernel} == set(chosen), kernel
    for _, _, _, registers, spilled, shared, size in rows:
        assert 0 <= int(registers) <= 512
        assert int(spilled) == 0
        assert 0 <= int(shared) <= max(targets.SHARED_LIMITS.values())
        assert int(size) > 0
    assert max(int(row[3]) for row in rows) > 32
