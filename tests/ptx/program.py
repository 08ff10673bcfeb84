"""Instructions as closures over the registers of a CTA; opcodes that are not known raise by name.

A closure takes a CTA and the threads that take part, as a mask or None for all, and replaces registers by new arrays.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from . import warp
from .alu import TYPES, compute
from .memory import PtxError, Shared
from .parse import Address, Instruction, Kernel, Number, Register, Special, Symbol, Vector

Step = Callable[..., None]
STORE = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
L1_KEEPS = {"ca", "nc"}  # and what names no cache
ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def fetch(operand: object, kind: str) -> Callable:
    """The operand's values as an array of the type, or one value for all threads."""
    dtype = TYPES[kind]
    if isinstance(operand, Register):
        i, store = operand.index, STORE[operand.bits]
        if dtype.itemsize < store.itemsize:  # the low part, as cvt and narrow stores read it
            return lambda cta: cta.registers[i].astype(f"u{dtype.itemsize}").view(dtype)
        if dtype.itemsize > store.itemsize:
            return lambda cta: cta.registers[i].astype(f"u{dtype.itemsize}").view(dtype)
        return (lambda cta: cta.registers[i]) if dtype == store else (lambda cta: cta.registers[i].view(dtype))
    if isinstance(operand, Number):
        if operand.float_bits:
            value = np.array(operand.value, f"u{operand.float_bits // 8}").view(f"f{operand.float_bits // 8}")
            value = value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
        elif dtype.kind == "b":
            value = np.array(operand.value != 0)
        else:
            bits = 8 * dtype.itemsize
            value = np.array(operand.value % (1 << bits), f"u{dtype.itemsize}").view(dtype)
        return lambda cta: value
    if isinstance(operand, Special):
        name = operand.name
        return lambda cta: cta.special(name).astype(dtype)
    if isinstance(operand, Symbol):
        base = np.array(Shared.BASE, dtype)
        return lambda cta: base
    if isinstance(operand, Vector):  # packed: the first item is the lowest
        width = dtype.itemsize // len(operand.items)
        items = [fetch(item, f"b{8 * width}") for item in operand.items]
        return lambda cta: np.stack([cta.spread(item(cta)) for item in items], axis=-1).reshape(-1).view(dtype)
    raise NotImplementedError(f"operand {operand!r}")


def assign(operand: object) -> Callable:
    """Puts values, widened as their own type says, into a register for the threads that take part."""
    if isinstance(operand, Vector):  # unpacked
        parts = len(operand.items)

        def unpack(cta, mask, value: np.ndarray) -> None:
            width = value.dtype.itemsize // parts
            pieces = np.ascontiguousarray(cta.spread(value)).view(f"u{width}").reshape(-1, parts)
            for i, item in enumerate(operand.items):
                if isinstance(item, Register):
                    assign(item)(cta, mask, np.ascontiguousarray(pieces[:, i]))

        return unpack
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda cta, mask, value: None
    if not isinstance(operand, Register):
        raise NotImplementedError(f"result {operand!r}")
    i, store = operand.index, STORE[operand.bits]

    def put(cta, mask, value: np.ndarray) -> None:
        if value.dtype != store:
            if value.dtype.itemsize != store.itemsize:
                value = value.astype(store)
            value = value.view(store)
        if mask is None:
            cta.registers[i] = value if value.ndim else np.full(cta.threads, value)
        else:
            cta.registers[i] = np.where(mask, value, cta.registers[i])

    return put


def address(operand: Address) -> Callable:
    offset = operand.offset
    if isinstance(operand.base, Symbol):
        constant = np.int64(Shared.BASE + offset)
        return lambda cta: np.full(cta.threads, constant)
    base = fetch(operand.base, f"b{operand.base.bits}")
    return lambda cta: base(cta).astype(np.int64) + offset


def data_type(parts: Sequence[str]) -> tuple[np.dtype, int]:
    vector = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
    return TYPES[parts[-1]], vector


def items(operand: object) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def load(instruction: Instruction) -> Step:
    parts = instruction.parts
    dtype, vector = data_type(parts)
    strong = bool({"volatile", "relaxed", "acquire"} & set(parts))
    acquires = "acquire" in parts
    cached = not strong and "cg" not in parts and "cv" not in parts
    shared = any(p.startswith("shared") for p in parts)
    where, puts = address(instruction.operands[1]), [assign(o) for o in items(instruction.operands[0])]
    size = dtype.itemsize * vector

    def step(cta, mask) -> None:
        lanes = cta.lanes(mask)
        memory = cta.shared if shared else cta.machine.arena
        offsets = memory.offsets(where(cta)[lanes], size)
        history = cta.machine.history
        if not shared and (acquires or (strong and cta.machine.volatile_acquires)):
            history.acquire(memory, cta, lanes, offsets)
        if not shared and acquires:
            cta.l1[:] = 0
        history.on_read(memory, cta, lanes, offsets, size, strong)
        if not shared and cached:
            history.through_l1(memory, cta, lanes, offsets, size)
        for put, value in zip(puts, memory.gather(offsets, dtype, vector), strict=True):
            if len(lanes) < cta.threads:
                whole = np.zeros(cta.threads, dtype)
                whole[lanes] = value
                value = whole
            put(cta, mask, value)

    return step


def store(instruction: Instruction) -> Step:
    parts = instruction.parts
    dtype, vector = data_type(parts)
    strong = bool({"volatile", "relaxed", "release"} & set(parts))
    releases = "release" in parts
    shared = any(p.startswith("shared") for p in parts)
    where = address(instruction.operands[0])
    gets = [fetch(o, parts[-1]) for o in items(instruction.operands[1])]
    size = dtype.itemsize * vector

    def step(cta, mask) -> None:
        lanes = cta.lanes(mask)
        memory = cta.shared if shared else cta.machine.arena
        offsets = memory.offsets(where(cta)[lanes], size)
        history = cta.machine.history
        values = [cta.spread(get(cta))[lanes] for get in gets]
        history.on_write(memory, cta, lanes, offsets, size, strong, values=values)
        memory.scatter(offsets, values)
        for value, kept in zip(values, memory.gather(offsets, dtype, vector), strict=True):
            if (value.view(f"u{dtype.itemsize}") != kept.view(f"u{dtype.itemsize}")).any():
                raise PtxError(f"threads of one store write different values to one place; {cta.at}")
        if not shared:
            cta.machine.progress()
            if releases:
                history.release(memory, cta, lanes, offsets, keeps=False)
            else:
                for offset in offsets.tolist() if memory.messages else ():
                    memory.messages.pop(offset, None)

    return step


def atomic(instruction: Instruction) -> Step:
    parts = instruction.parts
    returns = parts[0] == "atom"
    how = parts[-2]
    dtype = TYPES[parts[-1]]
    if how not in {*ATOMIC, "exch"} or "global" not in parts:
        raise NotImplementedError(f"opcode {instruction.opcode}")
    order = next((p for p in parts if p in ("release", "acquire", "acq_rel", "relaxed")), "relaxed")
    operands = list(instruction.operands)
    put = assign(items(operands.pop(0))[0]) if returns else None
    where, get = address(operands[0]), fetch(operands[1], parts[-1])

    def step(cta, mask) -> None:
        lanes = cta.lanes(mask)
        memory, history = cta.machine.arena, cta.machine.history
        offsets = memory.offsets(where(cta)[lanes], dtype.itemsize)
        if order in ("acquire", "acq_rel"):
            history.acquire(memory, cta, lanes, offsets)
            cta.l1[:] = 0
        history.on_write(memory, cta, lanes, offsets, dtype.itemsize, strong=True)
        if order in ("release", "acq_rel"):
            history.release(memory, cta, lanes, offsets, keeps=True)
        view, values = memory.data.view(dtype), cta.spread(get(cta))
        before = np.zeros(cta.threads, dtype)
        for i in cta.machine.random.permutation(len(lanes)):  # in any order
            at, lane = offsets[i] // dtype.itemsize, lanes[i]
            before[lane] = view[at]
            view[at] = values[lane] if how == "exch" else ATOMIC[how](view[at], values[lane])
        cta.machine.progress()
        if put is not None:
            put(cta, mask, before)

    return step


def copy(instruction: Instruction) -> Step:
    """cp.async: reads at once, arrives in shared memory as late as it may, when its group is waited for."""
    parts = instruction.parts
    if parts[2] == "commit_group":
        return lambda cta, mask: cta.commit(mask)
    if parts[2] == "wait_group":
        newest = instruction.operands[0].value
        return lambda cta, mask: cta.wait(mask, newest)
    if parts[2] == "wait_all":
        return lambda cta, mask: (cta.commit(mask), cta.wait(mask, 0))
    to, source, size = instruction.operands[:3]
    size = size.value
    put, get = address(to), address(source)
    count = fetch(instruction.operands[3], "b32") if len(instruction.operands) > 3 else lambda cta: np.uint32(size)
    cached = parts[2] == "ca"

    def step(cta, mask) -> None:
        lanes = cta.lanes(mask)
        counts = cta.spread(count(cta))[lanes]
        if not np.isin(counts, (0, size)).all():
            raise NotImplementedError("cp.async that copies in part")
        history, arena = cta.machine.history, cta.machine.arena
        data = np.zeros((len(lanes), size), np.uint8)
        reading = counts > 0
        if reading.any():
            offsets = arena.offsets(get(cta)[lanes[reading]], size)
            history.on_read(arena, cta, lanes[reading], offsets, size, False)
            if cached:
                history.through_l1(arena, cta, lanes[reading], offsets, size)
            data[reading] = arena.data[offsets[:, None] + np.arange(size)]
        offsets = cta.shared.offsets(put(cta)[lanes], size)
        history.on_write(cta.shared, cta, lanes, offsets, size, False, copied=True)
        cta.issue(lanes, offsets, data)

    return step


def ldmatrix(instruction: Instruction) -> Step:
    found = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode)
    if found is None or found[2]:
        raise NotImplementedError(f"opcode {instruction.opcode}")
    matrices = int(found[1])
    puts, where = [assign(o) for o in items(instruction.operands[0])], address(instruction.operands[1])

    def step(cta, mask) -> None:
        cta.whole_warps(mask)
        lanes = cta.lanes(mask)
        lanes = lanes[lanes % 32 < 8 * matrices]
        offsets = cta.shared.offsets(where(cta)[lanes], 16)
        cta.machine.history.on_read(cta.shared, cta, lanes, offsets, 16, False)
        rows = cta.shared.data[offsets[:, None] + np.arange(16)].view(np.uint32)
        every = np.zeros((cta.threads // 32, 8 * matrices, 4), np.uint32)
        every[lanes // 32, lanes % 32] = rows
        for put, value in zip(puts, warp.spread_rows(every, matrices), strict=True):
            put(cta, mask, value)

    return step


def mma(instruction: Instruction) -> Step:
    found = re.fullmatch(
        r"mma\.sync\.aligned\.(?:m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1|m16n8k8\.row\.col\.f32\.tf32\.tf32)\.f32",
        instruction.opcode,
    )
    if found is None:
        raise NotImplementedError(f"opcode {instruction.opcode}")
    d, a, b, c = (items(o) for o in instruction.operands)
    puts = [assign(o) for o in d]
    gets = [[fetch(o, kind) for o in some] for some, kind in ((a, "b32"), (b, "b32"), (c, "f32"))]

    def step(cta, mask) -> None:
        cta.whole_warps(mask)
        given = [[cta.spread(get(cta)) for get in some] for some in gets]
        values = warp.mma_16816(*given, found[1]) if found[1] else warp.mma_1688(*given)
        for put, value in zip(puts, values, strict=True):
            put(cta, mask, value)

    return step


def together(instruction: Instruction) -> Step:
    """shfl and redux."""
    parts = instruction.parts
    kind = parts[-1]
    put, gets = assign(instruction.operands[0]), [fetch(o, "b32") for o in instruction.operands[1:]]
    gets[0] = fetch(instruction.operands[1], kind)
    if parts[0] == "redux":

        def step(cta, mask) -> None:
            cta.whole_warps(mask, gets[1](cta))
            put(cta, mask, warp.reduce(parts[2], cta.spread(gets[0](cta))))
    else:

        def step(cta, mask) -> None:
            cta.whole_warps(mask, gets[3](cta))
            value, by, clamp = (cta.spread(get(cta)) for get in gets[:3])
            put(cta, mask, warp.shuffle(parts[2], value, by, clamp)[0])

    return step


def parameter(instruction: Instruction) -> Step:
    kind, source = instruction.parts[-1], instruction.operands[1]
    put, name = assign(instruction.operands[0]), source.base.name

    def step(cta, mask) -> None:
        raw = cta.machine.parameters[name]
        put(cta, mask, np.frombuffer(raw, TYPES[kind], 1, source.offset)[0:1].reshape(()))

    return step


def arithmetic(instruction: Instruction) -> Step:
    found = compute(instruction.opcode)
    if found is None:
        raise NotImplementedError(f"opcode {instruction.opcode} in {instruction.text!r}, line {instruction.line}")
    kinds, result, function = found
    put = assign(instruction.operands[0])
    if len(kinds) != len(instruction.operands) - 1:
        raise NotImplementedError(f"opcode {instruction.opcode} with {len(instruction.operands)} operands")
    gets = [fetch(o, kind) for o, kind in zip(instruction.operands[1:], kinds, strict=True)]
    dtype = TYPES[result]
    return lambda cta, mask: put(cta, mask, np.asarray(function(*[get(cta) for get in gets]), dtype))


FAMILIES = {"ld": load, "st": store, "atom": atomic, "red": atomic, "cp": copy, "ldmatrix": ldmatrix, "mma": mma}
FAMILIES |= {"shfl": together, "redux": together}


def step_of(instruction: Instruction) -> Step:
    opcode = instruction.opcode
    if opcode.startswith("ld.param"):
        plain = parameter(instruction)
    elif opcode == "bar.warp.sync":
        plain = lambda cta, mask: cta.warp_barrier(mask)  # noqa: E731
    else:
        plain = FAMILIES.get(instruction.parts[0], arithmetic)(instruction)
    return partial(guarded, guard_of(instruction), plain) if instruction.guard else plain


def guard_of(instruction: Instruction) -> Callable:
    i = instruction.guard.index
    return (lambda cta: ~cta.registers[i]) if instruction.negated else (lambda cta: cta.registers[i])


def guarded(guard: Callable, plain: Step, cta, mask) -> None:
    taking = guard(cta) if mask is None else guard(cta) & mask
    if taking.all():
        plain(cta, None)
    elif taking.any():
        plain(cta, taking)


class Program:
    """A kernel whose blocks are lists of (step, instruction), each with how it ends."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks = []
        for block in kernel.blocks:
            end = block.body[-1] if block.body and block.body[-1].ends_block else None
            body = block.body[:-1] if end else block.body
            if end is not None and end.parts[0] == "bar" and (end.opcode, end.operands) != ("bar.sync", (Number(0),)):
                raise NotImplementedError(f"opcode {end.text!r}: barriers of all threads only")
            self.blocks.append(([(step_of(i), i) for i in body], end))
        used = [i.parts for b in kernel.blocks for i in b.body if any(p.startswith("shared") for p in i.parts)]
        sizes = [TYPES[parts[-1]].itemsize for parts in used if parts[-1] in TYPES]
        self.granule = min([4, *sizes])  # of shared memory
