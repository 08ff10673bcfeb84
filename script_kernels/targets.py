"""Compiles every Triton kernel for every GPU it is meant for, on a machine that needs no GPU.

    python -m script_kernels.targets [--target sm_90 ...] [--only GROUP ...] [--jobs N]

Each call of `script_kernels.triton.tables` runs a launcher on tensors without storage (device "meta"); its kernel
launches are recorded, with the types, alignments and constants that the same launch on a GPU would have, and compiled
for each target. The table that is printed has one line per kernel,
variant and target: registers, spilled bytes, shared memory and size of the binary. The exit status is 1 if a kernel
does not compile, spills, or asks for more shared memory than the target has.
"""

import argparse
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Launch:
    """A kernel launch as the compiler sees it: type per argument, alignments, constants and options."""

    group: str
    variant: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))


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


def describe(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a launch, specialised as the runtime would: None and 1 are constants,
    multiples of 16 are known to be such, and pointers are aligned, as allocations are. What is in a tuple is always
    specialised."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...], constant: bool, free: bool) -> Any:
        if constant or value is None or (type(value) is int and value == 1 and not free):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(entry, (*path, i), False, False) for i, entry in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if hasattr(value, "dtype") or (value % 16 == 0 and not free):
            attributes[path] = [["tt.divisibility", 16]]
        if hasattr(value, "dtype"):
            return "*" + POINTERS[str(value.dtype)]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: kind(arguments[parameter.name], (i,), parameter.is_constexpr, parameter.do_not_specialize)
        for i, parameter in enumerate(kernel.params)
    }
    return signature, constants, attributes


POINTERS = {
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.int32": "i32",
    "torch.int64": "i64",
    "torch.uint8": "u8",
    "torch.bool": "i1",
}


@contextmanager
def recording(group: str) -> Iterator[Callable[[str], list[Launch]]]:
    """Within it, kernels are recorded in place of launched; the yielded function names and returns those since last."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        own = {name: options.pop(name) for name in list(options) if name in self.arg_names}
        launches.append((self, inspect.signature(self.fn).bind(*args, **own).arguments, options))

    def take(variant: str) -> list[Launch]:
        taken = [
            Launch(group, variant, kernel, *describe(kernel, arguments), options)
            for kernel, arguments, options in launches
        ]
        launches.clear()
        return taken

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield take
    finally:
        JITFunction.run = run


def collect(only: list[str] | None = None) -> list[Launch]:
    """Every distinct launch of the tables."""
    from .triton.tables import LAUNCHES

    found: dict[str, Launch] = {}
    for group, variant, call in LAUNCHES:
        if only and group not in only:
            continue
        with recording(group) as take:
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


def compile_launch(launch: Launch, target: str) -> Binary:
    """Compiles one launch for one target."""
    import triton
    from triton.compiler import ASTSource

    result = Binary(launch.group, launch.variant, launch.kernel.__name__, target)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=gpu_target(target), options=launch.options)
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
    if result.shared > SHARED_LIMITS[target]:
        result.problems.append(f"needs {result.shared} bytes of shared memory of {SHARED_LIMITS[target]}")
    return result


_LAUNCHES: list[Launch] = []  # inherited by the workers, which are forked: kernels cannot be pickled


def _compile_at(work: tuple[int, str]) -> Binary:
    return compile_launch(_LAUNCHES[work[0]], work[1])


def compile_all(launches: list[Launch], targets: tuple[str, ...], jobs: int) -> Iterator[Binary]:
    """Compiles in `jobs` processes; results come in order."""
    _LAUNCHES[:] = launches
    work = [(i, target) for i in range(len(launches)) for target in targets]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_compile_at, work)


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
    launches = collect(options.only)
    if not launches:
        print("no kernel found", file=sys.stderr)
        return 1
    row = "{:16} {:24} {:20} {:7} {:>9} {:>7} {:>7} {:>8}  {}"
    print(row.format("group", "variant", "kernel", "target", "registers", "spilled", "shared", "binary", "").rstrip())
    failed = 0
    count = 0
    for b in compile_all(launches, tuple(options.target or TARGETS), options.jobs):
        failed += bool(b.problems)
        count += 1
        cells = (b.group, b.variant, b.kernel.removesuffix("_kernel"), b.target)
        numbers = (b.registers, b.spilled, b.shared, b.size)
        print(row.format(*cells, *numbers, "; ".join(b.problems)).rstrip(), flush=True)
    print(f"{count} binaries, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
