"""How the rows of a call are spread over images or packed segments, and how kernels are launched on them.

Dense images and packed segments run through the same kernels. A program owns one tile of rows of one image, and `slot`
numbers the tiles of all images. Packed segments have lengths that only the device knows, while a grid has to be static:
segment s owns the slots from cu[s] // BLOCK + s on, which is at least cdiv(length, BLOCK) of them and T // BLOCK + S
altogether; a program whose slot lies behind the end of its segment returns at once. Bounds are ascending and within
[0, T]: `launch_place` sees to that on the device. Per-row arrays are flat: entry
`first + row`, with `first` = image * N or cu[s].

What a kernel can do without is passed as None: Triton compiles a variant without it, as it would for a flag.
"""

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .replay import current, explain

WIDEST = 8192  # L of an image of more tokens is not kept in memory


@dataclass(frozen=True)
class Layout:
    """Images (B, N, ...) or packed segments (T, ...) of one call."""

    segments: int
    n: int  # tokens per image, or T
    cu_seqlens: torch.Tensor | None = None  # (S + 1,) int32

    @staticmethod
    def of(tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> "Layout":
        if cu_seqlens is None:
            return Layout(tokens.shape[0], tokens.shape[1])
        return Layout(cu_seqlens.shape[0] - 1, tokens.shape[0], cu_seqlens.contiguous())

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def rows(self) -> int:
        return self.n if self.packed else self.segments * self.n

    @property
    def width(self) -> int:
        """Columns of L in memory: for packed segments whatever the longest may need, for images too long 0."""
        return min(self.n, WIDEST) if self.packed or self.n <= WIDEST else 0

    def slots(self, block: int) -> tuple[int, int]:
        """Slots per image and in all."""
        if self.packed:
            total = self.n // block + self.segments
            return total, total
        per_image = triton.cdiv(self.n, block)
        return per_image, per_image * self.segments

    def strides(self, x: torch.Tensor) -> tuple[int, ...]:
        """Strides (image, row, ...) of one of the call's arrays."""
        return (0, *x.stride()) if self.packed else x.stride()


def launch(kernel: Any, programs: int, *arguments: Any, registers: int | None = None, **options: Any) -> None:
    """Launches on the device of the first tensor: Triton takes the current one. CPU tensors are interpreted.

    registers: a limit per thread. Without it ptxas aims at occupancy, and may spill a little to save a few.
    """
    device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
    guard: AbstractContextManager[object] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    if registers is not None and device.type != "cpu" and torch.version.hip is None:
        options["maxnreg"] = registers
    with guard:
        try:
            compiled = kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
        except RuntimeError as error:
            if "launch_cooperative_grid" in options:
                explain(error, kernel.__name__, programs)
            raise
    recorder = getattr(current, "recorder", None)
    if recorder is not None:
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        recorder.note(compiled, kernel.__name__, programs, [*arguments, *constants])


def saturate(x: float) -> float:
    """A parameter within fp32, which is what kernels take: as an infinity it would make NaN of a product with 0."""
    largest = torch.finfo(torch.float32).max
    return min(max(x, -largest), largest)


def double_bits(value: float) -> int:
    """The 64 bits of a double as a signed integer: kernel arguments that are floats would arrive in fp32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def segment(p_cu, i_s, N):
    """First flat row (int64) and length of a segment."""
    if p_cu is not None:
        first = tl.load(p_cu + i_s).to(tl.int64)
        n = (tl.load(p_cu + i_s + 1) - first).to(tl.int32)
    else:
        first = i_s.to(tl.int64) * N
        n = N
    return first, n


@triton.jit
def locate(
    p_cu,  # (S + 1,) int32, or None for images
    i_slot,
    S,
    N,  # tokens per image, or of all segments
    slots,  # per image; unused for segments
    BLOCK: tl.constexpr,
):
    """Image or segment of a slot, the tile's number in it, its first flat row (int64) and its length."""
    if p_cu is not None:
        i_s = -1
        for i_c in range(0, S, 1024):
            o_s = tl.max_contiguous(i_c + tl.arange(0, 1024), 1)  # one by one: arrays of 1024 take up the layout
            b_cu = tl.load(p_cu + o_s, mask=o_s < S, other=0)
            i_s += tl.sum(((o_s < S) & (b_cu // BLOCK + o_s <= i_slot)).to(tl.int32), axis=0)
        i_s = tl.maximum(i_s, 0)
        first, n = segment(p_cu, i_s, N)
        i_tile = i_slot - (first.to(tl.int32) // BLOCK + i_s)
    else:
        i_s = i_slot // slots
        i_tile = i_slot - i_s * slots
        first, n = segment(p_cu, i_s, N)
    return i_s, i_tile, first, n


@triton.jit
def image_of(p, p_cu, i_s, first, strides):
    """Pointer to the first row of an image or segment."""
    return p + first * strides[1] if p_cu is not None else p + i_s.to(tl.int64) * strides[0]


@triton.jit
def order_key(b_x):
    """int32 keys that order as the floats do, -0 and +0 alike."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(b_key):
    """Inverse of `order_key`."""
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
