"""The most multiply-adds that a core's vector units take, by loops of nothing else.

They are written as machine code, so that no compiler is needed, and they assume nothing of how many units there are.
x86-64 with AVX2 at least; elsewhere there is no figure.
"""

import ctypes
import dataclasses
import mmap
import platform
import sys
import time
from collections.abc import Callable

CHAINS = 12  # independent sums: latency (4 or 5 cycles) times the two units that there are at most, and some
ROUNDS = 200_000


@dataclasses.dataclass(frozen=True)
class Unit:
    """One kind of instruction: `flops` of each, its bytes for a sum in register 4 to 15."""

    flops: int
    encode: Callable[[int], bytes]


def _vex(register: int) -> bytes:
    """vfmadd231ps ymm(register), ymm0, ymm1"""
    return bytes([0xC4, 0xE2 if register < 8 else 0x62, 0x7D, 0xB8, 0xC1 | (register & 7) << 3])


def _evex(register: int, prefix: int, opcode: int) -> bytes:
    """The instruction on zmm(register), zmm0, zmm1"""
    return bytes([0x62, 0xF2 if register < 8 else 0x72, prefix, 0x48, opcode, 0xC1 | (register & 7) << 3])


AVX2 = Unit(16, _vex)
AVX512 = Unit(32, lambda register: _evex(register, 0x7D, 0xB8))  # vfmadd231ps
BF16 = Unit(64, lambda register: _evex(register, 0x7E, 0x52))  # vdpbf16ps
UNITS = {
    ("avx2", "float32"): AVX2,
    ("avx512", "float32"): AVX512,
    ("avx512_bf16", "float32"): AVX512,
    ("avx512_bf16", "bfloat16"): BF16,
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one core, measured: instructions a second, and the clock by a chain of multiplications, three cycles each."""

    unit: Unit
    rate: float
    clock: float

    @property
    def flops(self) -> float:
        return self.rate * self.unit.flops

    @property
    def name(self) -> str:
        """The width, how many a cycle, the clock."""
        return (
            f"multiply-adds alone: {self.unit.flops} flop x {self.rate / self.clock:.2f} x {self.clock / 1e9:.2f} GHz"
        )


def _seconds(body: bytes) -> float:
    """The best of several runs of ROUNDS rounds of `body`, which may use eax and the vector registers."""
    loop = body + b"\x48\xff\xcf"  # dec rdi
    back = (-(len(loop) + 6)).to_bytes(4, "little", signed=True)
    code = b"\xc5\xfc\x77" + loop + b"\x0f\x85" + back + b"\xc5\xf8\x77\xc3"  # vzeroall; ...; jnz; vzeroupper; ret
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as memory:
        memory.write(code)
        start = ctypes.c_char.from_buffer(memory)
        run = ctypes.CFUNCTYPE(None, ctypes.c_int64)(ctypes.addressof(start))
        best = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            run(ROUNDS)
            best = min(best, time.perf_counter() - begin)
        del run, start  # the mapping cannot be closed while it is referred to
    return best


def measure(level: str, dtype: str) -> Peak | None:
    """At a SIMD level that this CPU has, which the caller knows; None where there is nothing to measure it by."""
    unit = UNITS.get((level, dtype)) or UNITS.get((level, "float32"))
    if unit is None or platform.machine() != "x86_64" or sys.platform == "win32":
        return None
    try:
        clock = 3.0 * 16 * ROUNDS / _seconds(b"\x0f\xaf\xc0" * 16)  # imul eax, eax
        body = b"".join(unit.encode(4 + chain) for chain in range(CHAINS)) * 2
        return Peak(unit, 2 * CHAINS * ROUNDS / _seconds(body), clock)
    except OSError:  # memory that is both written and run may be forbidden
        return None
