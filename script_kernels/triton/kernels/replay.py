"""Repeated calls: what a launcher does for one kind of call is recorded once, and from then on only launched.

A launcher plans, looks its tables up, allocates, and hands Triton's run time some twenty arguments a kernel, which
finds the compiled kernel by the types of them all: on the host that takes longer than a small image on the GPU. All of
it follows from what `kind` collects of the arguments: dtypes, shapes, strides and alignments of the tensors, and the
other values as they are. So the second call of a kind is recorded: compiled kernels, their arguments, and of each
pointer the tensor that it lies in. Further ones take one allocation for all that is temporary and one for each result,
add up the pointers, and call Triton's launcher of each kernel.

A recorder sees every operation of PyTorch. Where a launcher does anything but allocate, view, set to zero and launch,
or where a pointer has no known origin, nothing is recorded for that kind of call, and the launcher runs as ever.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

DEVICES = {"cuda"}  # of the interpreter's tensors nothing is compiled
MOST_KINDS = 4096  # of calls, remembered at a time
ALIGNMENT = 256  # bytes
ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}

current = threading.local()  # .recorder, while one is at work


@dataclass(frozen=True)
class Step:
    """One launch: Triton's launcher, what comes before the arguments of the kernel, these, and where pointers go."""

    compiled: Any  # Triton's, kept loaded
    run: Callable[..., None]
    function: Any
    metadata: Any
    name: str
    programs: int
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]  # place among the arguments, number of the tensor, offset in bytes


@dataclass(frozen=True)
class Record:
    """Tensors are numbered: those of the call, results, and the room of all that is temporary."""

    room: int  # bytes
    clear: tuple[tuple[int, int], ...]  # of it set to zero first: from, length
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    single: bool
    steps: tuple[Step, ...]

    def play(self, tensors: list[torch.Tensor], device: torch.device) -> Any:
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]
        room = torch.empty(self.room, dtype=torch.uint8, device=device)
        for start, length in self.clear:
            room.narrow(0, start, length).zero_()
        self.launch([*tensors, *results, room])
        return results[0] if self.single else tuple(results)

    def launch(self, tensors: list[torch.Tensor]) -> None:
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        bases = [x.data_ptr() for x in tensors]
        for step in self.steps:
            arguments = list(step.arguments)
            for place, number, offset in step.pointers:
                arguments[place] = bases[number] + offset
            try:
                step.run(step.programs, 1, 1, stream, step.function, step.metadata, None, None, None, *arguments)
            except RuntimeError as error:
                explain(error, step.name, step.programs)
                raise


def explain(error: RuntimeError, name: str, programs: int) -> None:
    """Of a cooperative launch that does not fit, an error that names op and cure; of any other, nothing."""
    if "cooperative" in str(error):
        raise RuntimeError(
            f"{name} of script.dpp_map, qcsp and prune: its {programs} programs wait for each other and the GPU has no "
            f"room for all of them at once ({error}). A green context or an MPS limit "
            "(CUDA_MPS_ACTIVE_THREAD_PERCENTAGE) may hold back multiprocessors: lift it for this process"
        ) from error


class UnrecordableError(Exception):
    """Why a call cannot be repeated from a record."""


class Recorder(TorchDispatchMode):
    """Within it a launcher's call is done as ever, and noted."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.rooms: list[torch.Tensor] = []  # kept, so that no address is given twice
        self.cleared: list[torch.Tensor] = []
        self.launches: list[tuple[Any, str, int, list[Any]]] = []
        self.refused: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.rooms.append(found)
        elif func is torch.ops.aten.zero_.default and not self.launches:
            self.cleared.append(args[0])
        elif not func.is_view:
            self.refused = f"calls {func}"
        return found

    def note(self, compiled: Any, name: str, programs: int, arguments: list[Any]) -> None:
        self.launches.append((compiled, name, programs, arguments))

    def record(self, results: Any) -> Record:
        """What was noted, or `UnrecordableError`."""
        if self.refused:
            raise UnrecordableError(self.refused)
        single = isinstance(results, torch.Tensor)
        returned = [results] if single else list(results)
        storages = [x.untyped_storage().data_ptr() for x in self.rooms]
        numbers: dict[int, tuple[int, int]] = {}  # of a room: tensor, offset in it
        for i, x in enumerate(returned):
            room = storages.index(x.data_ptr()) if x.data_ptr() in storages else None
            if room is None or room in numbers or not x.is_contiguous():
                raise UnrecordableError("a result that is no allocation of its own")
            if self.rooms[room].untyped_storage().nbytes() != x.numel() * x.element_size():
                raise UnrecordableError("a result that is a part of an allocation")
            numbers[room] = len(self.tensors) + i, 0
        size = 0
        for room, x in enumerate(self.rooms):
            if room not in numbers:
                numbers[room] = len(self.tensors) + len(returned), size
                size += -(-x.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT

        def origin(x: torch.Tensor) -> tuple[int, int]:
            storage = x.untyped_storage().data_ptr()
            if storage in storages:
                number, start = numbers[storages.index(storage)]
                return number, start + x.data_ptr() - storage
            given = [i for i, own in enumerate(self.tensors) if own.data_ptr() == x.data_ptr()]
            if len(given) != 1:
                raise UnrecordableError("a pointer of which it is not known where it comes from")
            return given[0], 0

        clear = []
        for x in self.cleared:
            number, start = origin(x)
            if number < len(self.tensors) + len(returned) or not x.is_contiguous():
                raise UnrecordableError("something set to zero that is not temporary")
            if x.numel():
                clear.append((start, x.numel() * x.element_size()))
        steps = []
        for compiled, name, programs, arguments in self.launches:
            places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
            pointers = tuple((i, *origin(arguments[i])) for i in places)
            constants = tuple(None if isinstance(x, torch.Tensor) else x for x in arguments)
            launcher = (compiled, compiled.run, compiled.function, compiled.packed_metadata)
            steps.append(Step(*launcher, name, programs, constants, pointers))
        shapes = tuple((tuple(x.shape), x.dtype) for x in returned)
        return Record(size, tuple(clear), shapes, single, tuple(steps))


def kind(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """All that a launcher's work follows from, and the tensors."""
    tensors: list[torch.Tensor] = []
    parts: list[Any] = [*named]
    for x in (*arguments, *named.values()):
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            parts.append((x.dtype, x.shape, x.stride(), x.data_ptr() % 16))
        else:
            parts.append(tuple(x) if isinstance(x, list) else x)
    return (tensors[0].device, *parts), tensors


def hooked() -> bool:
    """Whether somebody wants to be told of every launch: a profiler."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def record(launcher: Callable[..., Any], tensors: list[torch.Tensor], *arguments: Any, **named: Any) -> Any:
    """The launcher's result, and the record of its call or None."""
    recorder = Recorder(tensors)
    current.recorder = recorder
    try:
        with recorder:
            found = launcher(*arguments, **named)
    finally:
        current.recorder = None
    try:
        return found, recorder.record(found)
    except UnrecordableError:
        return found, None


def replayed(launcher: Launcher) -> Launcher:
    """The launcher, whose first argument is a tensor, its calls replayed from the third of a kind on."""
    records: dict[Any, Record | None] = {}
    met: set[Any] = set()

    @functools.wraps(launcher)
    def call(*arguments: Any, **named: Any) -> Any:
        if arguments[0].device.type not in DEVICES:
            return launcher(*arguments, **named)
        key, tensors = kind(arguments, named)
        device = key[0]
        found = records.get(key)
        if found is not None and not hooked():
            if device.type != "cuda" or torch.cuda.current_device() == device.index:
                return found.play(tensors, device)
            with torch.cuda.device(device):
                return found.play(tensors, device)
        if key in records or key not in met or hooked():
            if len(met) >= MOST_KINDS:
                met.clear()
                records.clear()
            met.add(key)
            return launcher(*arguments, **named)
        result, records[key] = record(launcher, tensors, *arguments, **named)
        return result

    return call  # type: ignore[return-value]
