"""Peak memory of one call in a process of its own: python -m bench.memory OP VARIANT TOKENS KEEP WIDTH, in bytes."""

import os
import pathlib
import subprocess
import sys

import torch

from bench.cases import Inputs, Row, make_case


def status(name: str) -> int:
    """A memory field of this process, in bytes. Linux."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure_here(op: str, variant: str, count: int, keep: int, width: int) -> int:
    """The most that the process held during the call, above what it held before.

    VmHWM and not getrusage: on Linux ru_maxrss begins at the parent's peak. If an earlier moment of this process was
    higher, that one counts, so the result is never too small; the tokens are made in place to keep that moment low.
    """
    torch.set_num_threads(1)
    before = 0
    for tokens, kept in ((64, 4), (count, keep)):  # the small call loads what a first call loads
        inputs = Inputs(Row(1, tokens, kept), width, torch.float32, torch.device("cpu"), "gaussian")
        made = torch.empty(1, tokens, width).normal_(generator=torch.Generator().manual_seed(0))
        inputs.__dict__["tokens"] = made
        case = make_case(op, inputs)
        call = case.ours if variant == "ours" else case.eager()
        before = status("VmRSS")
        call()
    return status("VmHWM") - before


def measure(op: str, variant: str, count: int, keep: int, width: int) -> int:
    """measure_here in a fresh process with one thread."""
    arguments = [op, variant, str(count), str(keep), str(width)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


if __name__ == "__main__":
    print(measure_here(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])))
