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


def assert_all_compile(target, *groups):
    """Every kernel, or every one of the groups, compiles for the target and fits: also into the least shared memory of
    the targets of its kind, for what a kernel asks for differs little between them."""
    done = run("-m", "script_kernels.targets", f"--target={target}", *(f"--only={name}" for name in groups))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    *lines, total = done.stdout.splitlines()[1:]
    assert total == f"{len(lines)} binaries, 0 with problems"
    rows = [line.rsplit(maxsplit=6) for line in lines]
    assert len(rows) > (20 if groups else 100)
    least = min(limit for name, limit in targets.SHARED_LIMITS.items() if name[:3] == target[:3])
    for _, _, compiled_for, registers, spilled, shared, size in rows:
        assert compiled_for == target
        assert 0 <= int(registers) <= 512
        assert int(spilled) == 0
        assert 0 <= int(shared) <= least
        assert int(size) > 0
    assert max(int(row[3]) for row in rows) > 32
