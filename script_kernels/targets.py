"""Compiles every Triton kernel for every GPU it is meant for, on a machine that needs no GPU.

    python -m script_kernels.targets [--target sm_90 ...] [--only GROUP ...] [--jobs N]

Each call of `script_kernels.triton.tables` runs a launcher on tensors without storage (device "meta"); its kernel
launches are recorded, with the types, alignments and constants that Triton's run time derives for the same launch on a
GPU, and compiled for each target into its cache. The table that is printed has one line per kernel,
variant and target: registers, spilled bytes, shared memory and size of the binary. The exit status is 1 if a kernel
does not compile, spills, or asks for more registers or shared memory than a block can have.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Shared memory that one block may ask for, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability" (opt-in maximum); AMD CDNA3 ISA, 64 KiB of LDS per workgroup.
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
TARGETS = tuple(SHARED_LIMITS)
REGISTERS = 65536  # of a multiprocessor, on any of NVIDIA's targets; a thread gets them eight at a time


@dataclass(frozen=True)
class Launch:
    """A kernel launch as Triton's run time hands it to the compiler, for one target."""

    group: str
    variant: str
    target: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, self.target, self.signature, self.constants, self.attributes, self.options))


@dataclass
class Binary:
    """What a compiled kernel needs of a target, or why there is none."""

    group: str
    variant: str
    kernel: str
    target: str
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes
    size: int = 0  # bytes
    problems: list[str] = field(default_factory=list)


def gpu_target(name: str) -> Any:
    """Triton's GPUTarget of a name in TARGETS."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


class Driver:
    """Stands for the driver of a GPU that need not be here: what is asked of it before a kernel is compiled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # kernels remember by it what they know of a device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return gpu_target(self.target)


@contextmanager
def recording(group: str, target: str = "sm_90") -> Iterator[Callable[[str], list[Launch]]]:
    """Within it, kernels are recorded in place of compiled and launched; the yielded function names and returns those
    since last. Types, alignments, constants and options are those that the run time derives for the target."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, ...]] = []
    run, compiled, active = JITFunction.run, JITFunction._do_compile, driver._active

    def record(
        self: Any, key: str, signature: dict, device: str, constants: dict, options: Any, attributes: dict, warmup: bool
    ) -> None:
        found.append((self, signature, constants, attributes, options))

    def without_nvidias_options(self: Any, *arguments: Any, **options: Any) -> Any:
        if not target.startswith("sm_"):
            options.pop("maxnreg", None)
            options |= {"TF32": False} if "TF32" in options else {}
        return run(self, *arguments, **options)

    def take(variant: str) -> list[Launch]:
        taken = [Launch(group, variant, target, *launch) for launch in found]
        found.clear()
        return taken

    JITFunction.run, JITFunction._do_compile, driver._active = without_nvidias_options, record, Driver(target)
    try:
        yield take
    finally:
        JITFunction.run, JITFunction._do_compile, driver._active = run, compiled, active


def collect(only: list[str] | None = None, targets: Sequence[str] = ("sm_90",)) -> list[Launch]:
    """Every distinct launch of the tables."""
    from .triton.tables import LAUNCHES

    found: dict[str, Launch] = {}
    for group, variant, call in LAUNCHES:
        if only and group not in only:
            continue
        for target in targets:
            with recording(group, target) as take:
                call()
                for launch in take(variant):
                    found.setdefault(launch.key, launch)
    return list(found.values())


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread, read by the cuobjdump in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory per lane, from the kernel's metadata."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found.group(1))

    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")


def compile_launch(launch: Launch) -> Binary:
    """Compiles one launch, as the run time would: what it finds in Triton's cache afterwards is this binary."""
    import triton
    from triton.compiler import ASTSource

    target = launch.target
    result = Binary(launch.group, launch.variant, launch.kernel.__name__, target)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=gpu_target(target), options=launch.options.__dict__)
    except Exception as error:  # a compiler may raise anything; what it says goes into the table
        result.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
        return result
    result.shared = compiled.metadata.shared
    if target.startswith("sm_"):
        binary = compiled.asm["cubin"]
        result.registers, result.spilled = nvidia_usage(binary)
    else:
        binary = compiled.asm["hsaco"]
        result.registers, result.spilled = amd_usage(compiled.asm["amdgcn"])
    result.size = len(binary)
    if result.spilled:
        result.problems.append(f"spills {result.spilled} bytes")
    threads = 32 * compiled.metadata.num_warps
    if target.startswith("sm_") and -(-result.registers // 8) * 8 * threads > REGISTERS:
        result.problems.append(f"needs {result.registers} registers for each of {threads} threads, of {REGISTERS}")
    if result.shared > SHARED_LIMITS[target]:
        result.problems.append(f"needs {result.shared} bytes of shared memory of {SHARED_LIMITS[target]}")
    return result


_LAUNCHES: list[Launch] = []  # inherited by the workers, which are forked: kernels cannot be pickled


def _compile_at(i: int) -> Binary:
    return compile_launch(_LAUNCHES[i])


def compile_all(launches: list[Launch], jobs: int) -> Iterator[Binary]:
    """Compiles in `jobs` processes; results come in order."""
    _LAUNCHES[:] = launches
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_compile_at, range(len(launches)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m script_kernels.targets", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="compile for this target only (repeatable)")
    parser.add_argument("--only", action="append", metavar="GROUP", help="only this group of launches (repeatable)")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    launches = collect(options.only, options.target or TARGETS)
    if not launches:
        print("no kernel found", file=sys.stderr)
        return 1
    row = "{:16} {:24} {:20} {:7} {:>9} {:>7} {:>7} {:>8}  {}"
    print(row.format("group", "variant", "kernel", "target", "registers", "spilled", "shared", "binary", "").rstrip())
    failed = 0
    count = 0
    for b in compile_all(launches, options.jobs):
        failed += bool(b.problems)
        count += 1
        cells = (b.group, b.variant, b.kernel.removesuffix("_kernel"), b.target)
        numbers = (b.registers, b.spilled, b.shared, b.size)
        print(row.format(*cells, *numbers, "; ".join(b.problems)).rstrip(), flush=True)
    print(f"{count} binaries, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
