"""Triton's launchers on CPU tensors, their kernels compiled for a GPU and their PTX interpreted.

    with interpreted(seed=1) as launches:
        indices, gains = launch_dpp_map(kernel, 12, columns=64)

`launches` lists what ran. Not to be used where Triton's own interpreter is on.
"""

import ctypes
import importlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from script_kernels import targets
from script_kernels.options import GspOptions, PruneOptions
from script_kernels.triton.kernels import greedy, plan, replay

from .machine import Machine
from .memory import Arena
from .parse import parse
from .program import Program

FORMATS = {"i1": "<i", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<i", "u32": "<I", "u64": "<Q"}
FORMATS |= {"fp32": "<f", "fp64": "<d"}
PROGRAMS: dict[str, Program] = {}  # by PTX
COMPILED: dict[str, Any] = {}


@dataclass
class Launched:
    kernel: str
    grid: int
    turns: int
    cooperative: bool
    ptx: str


class Pointer:
    """An address within a tensor, in the place of the tensor that a launcher would have passed."""

    def __init__(self, address: int, inside: torch.Tensor) -> None:
        self.address, self.inside = address, inside

    def data_ptr(self) -> int:
        return self.address


def pointers(kinds: Any, values: Any, known: list[torch.Tensor]) -> list[Any]:
    """`values` with addresses, which a replayed launch passes, as pointers into the tensors that they lie in."""
    found = []
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, str) and kind.startswith("*") and isinstance(value, int):
            inside = [x for x in known if 0 <= value - x.data_ptr() < max(x.untyped_storage().nbytes(), 1)]
            value = Pointer(value, inside[0])
        found.append(value)
    return found


def flatten(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that reach the device, with their types."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def spans_of(tensors: list[tuple[str, torch.Tensor]]) -> list[tuple[int, int, str]]:
    found = []
    for name, x in tensors:
        if x.numel():
            reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            found.append((x.data_ptr(), reach * x.element_size(), name))
    return found


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def execute(
    compiled: Any, kinds: Any, names: list[str], grid: int, values: Any, edit: Callable, options: dict
) -> Launched:
    text = edit(compiled.name, compiled.asm["ptx"])
    if text not in PROGRAMS:
        PROGRAMS[text] = Program(parse(text))
    program = PROGRAMS[text]
    tensors = [
        (name, x.inside if isinstance(x, Pointer) else x)
        for name, x in zip(names, values, strict=True)
        if isinstance(x, (torch.Tensor, Pointer))
    ]
    arena = Arena(spans_of(tensors), min([4, *(x.element_size() for _, x in tensors)]))
    for address, place, size in arena.regions():
        arena.data[place : place + size] = bytes_at(address, size)
    raw = []
    for kind, value in flatten(kinds, values):
        pointer = kind.startswith("*")
        raw.append(struct.pack("<q", value.data_ptr()) if pointer else struct.pack(FORMATS[kind], value))
    raw += [bytes(8)] * (len(program.kernel.parameters) - len(raw))  # Triton's scratch memory, of which there is none
    if compiled.metadata.global_scratch_size:
        raise NotImplementedError("scratch memory")
    for (name, size), value in zip(program.kernel.parameters.items(), raw, strict=True):
        assert len(value) == size, (name, size, value)
    parameters = dict(zip(program.kernel.parameters, raw, strict=True))
    cooperative = compiled.metadata.launch_cooperative_grid
    machine = Machine(program, grid, parameters, arena, compiled.metadata.shared, resident=cooperative, **options)
    machine.run()
    for address, place, size in arena.regions():
        bytes_at(address, size)[:] = arena.data[place : place + size]
    return Launched(compiled.name, grid, machine.turns, cooperative, text)


@contextmanager
def interpreted(
    target: str = "sm_80", edit: Callable[[str, str], str] = lambda name, ptx: ptx, **options: Any
) -> Iterator[list[Launched]]:
    """Within it, launches are interpreted. edit: of a kernel's name and PTX, what runs in its place. The launchers plan
    as for an H100. options: those of `Machine`."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "Triton interprets by itself"
    launches: list[Launched] = []

    class Compiled:
        function = packed_metadata = None

        def __init__(
            self, kernel: JITFunction, signature: dict, constants: dict, attributes: dict, chosen: Any
        ) -> None:
            key = repr((kernel.__name__, target, signature, constants, attributes, chosen))
            if key not in COMPILED:
                source = ASTSource(kernel, signature, constants, attributes)
                COMPILED[key] = triton.compile(source, target=targets.gpu_target(target), options=chosen.__dict__)
            self.compiled = COMPILED[key]
            self.kinds, self.names = tuple(signature.values()), list(signature)

        def launch_metadata(self, *arguments: Any) -> None:
            return None

        def run(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *rest: Any) -> None:
            assert (y, z) == (1, 1)
            values = pointers(self.kinds, rest[3:], known)  # after the metadata and two hooks
            launches.append(execute(self.compiled, self.kinds, self.names, x, values, edit, options))

    def compile_it(
        self: Any, key: str, signature: dict, device: str, constants: dict, chosen: Any, attributes: dict, warmup: bool
    ) -> Compiled:
        return Compiled(self, signature, constants, attributes, chosen)

    def planned(device: torch.device, *sizes: Any, **given: Any) -> Any:
        return plan_greedy(torch.device("meta"), *sizes, **given)

    def launch_record(self: replay.Record, tensors: list[torch.Tensor]) -> None:
        known[:] = tensors
        launch(self, tensors)

    known: list[torch.Tensor] = []
    plan_greedy, launch = plan.plan_greedy, replay.Record.launch
    with (
        mock.patch.object(replay.Record, "launch", launch_record),
        mock.patch.object(JITFunction, "_do_compile", compile_it),
        mock.patch.object(driver, "_active", targets.Driver(target)),
        mock.patch.object(plan, "plan_greedy", planned),
        mock.patch.object(greedy, "INTERPRETER_UNROLL", 1 << 10),
    ):
        yield launches


class PtxBackend:
    """The ops as the tests of `tests/` call them, every launch interpreted."""

    device = "cpu"

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.launches: list[Launched] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        launch = getattr(importlib.import_module(f"script_kernels.triton.{op}"), f"launch_{op}")
        kind = {"gsp": GspOptions, "prune": PruneOptions, "prune_varlen": PruneOptions}.get(op)

        def call(*arguments: Any, **given: Any) -> Any:
            own = {
                name: given.pop(name) for name in ("aligned", "query_mask", "columns", "matrix_free") if name in given
            }
            if kind is not None:
                arguments, given = (*arguments, kind(**given)), {}
            with interpreted(**self.options) as launches:
                result = launch(*arguments, **own, **given)
            self.launches += launches
            return result

        return call
