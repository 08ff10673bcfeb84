"""Greedy MAP of a determinantal point process on a ready kernel, and the launch of greedy steps for all who need them.

One launch does all steps of all images (see greedy.py).

**Repeatable and batch-invariant.** The bits of a result depend neither on how many programs share an image nor on
their width: a column is one chain of fused multiply-adds over the pivots in order, whatever block it lies in, and the
maximum of keys is exact. The dispatch is therefore free to look at the size of the batch and of the device.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton

from .greedy import greedy_kernel
from .tokens import device_guard, register_limit, slot_count

RANK_TOLERANCE = 1e-6
SINGLE_WORK = 45_000  # N * k up to which one program per image serves; by the model of DESIGN.md, not yet measured
EXTRA_ROUNDS = 3  # one per level whose rank can run out

# Columns per program -> warps, rows of C read at once, registers per thread.
BLOCKS = {64: (2, 16, 128), 256: (4, 16, 128), 1024: (8, 16, 255), 2048: (16, 4, 128)}
# Rows of L made from the tokens: the tile that sums over the features has one layout for all widths.
FEATURE_BLOCKS = {128: (8, 16, 255), 512: (8, 16, 255), 2048: (8, 4, 255)}
FEATURE_ROWS, FEATURE_COLS = 64, 64
INTERPRETER_UNROLL = 4  # the interpreter pays for masked rows as for others


@dataclass(frozen=True)
class Plan:
    """How the greedy steps of a batch are spread over programs; changes no bit of the result."""

    columns: int  # per program
    slots: int  # programs per image
    total: int  # programs in all
    grid: bool  # an image may have several programs
    resident: bool  # all rounds in one launch
    images: int  # per launch
    rounds: int

    def slot_buffer(self, device: torch.device) -> torch.Tensor:
        """Room for the keys of all rounds, not yet cleared; empty where programs exchange nothing."""
        rounds = self.rounds + 1 if self.grid else 0
        return torch.empty((rounds, self.total), dtype=torch.int64, device=device)


def plan_greedy(
    device: torch.device,
    segments: int,
    n: int,
    k: int,
    *,
    features: bool = False,
    varlen: bool = False,
    upto: int | None = None,
    columns: int | None = None,
) -> Plan:
    """The dispatch table. n is the length of an image, or of all packed segments, none longer than `upto`, together.

    One program per image while N * k is small. Otherwise the narrowest blocks with which all programs are on the device
    at once, one program per image if there are none, and else several launches. `columns` overrides the choice.
    """
    blocks = FEATURE_BLOCKS if features else BLOCKS
    width = n if upto is None else min(n, upto)
    processors = 132 if device.type == "meta" else 0  # what is only compiled is compiled as for an H100
    if device.type == "cuda" and torch.version.hip is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    if columns is None:
        mean = triton.cdiv(n, segments) if varlen else n
        least = mean if mean * k <= SINGLE_WORK else 0
        single = next((c for c in blocks if c >= width), None)
        fitting = (c for c in blocks if c >= least and slot_count(segments, n, c, varlen)[1] <= processors)
        columns = next(fitting, None) or single or max(blocks)
        if not varlen and least and single:
            columns = single
    slots, total = slot_count(segments, n, columns, varlen)
    grid = width > columns
    images = segments
    if grid and not varlen and slots <= processors:
        images = min(segments, processors // slots)
    resident = not grid or (total if varlen else images * slots) <= processors
    return Plan(columns, slots, total, grid, resident, images, k + EXTRA_ROUNDS)


def launch_greedy(
    order: torch.Tensor,
    k: int,
    plan: Plan,
    slots: torch.Tensor,
    *,
    kernel: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    inv_norm: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    tier: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    need: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    limits: torch.Tensor | None = None,
    above: int = 0,
    upto: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks tokens greedily: indices (B, k) int64 in greedy order, -1 past the last pick, and gains (B, k) fp32.

    order: relevance, one per token, with `inv_norm`; or, without it, the kernel itself, whose diagonal is then used.
    kernel: L (B, N, N) of any strides, or (T, W) rows of packed segments; without it rows come from `tokens`.
    slots: `plan.slot_buffer`, cleared. tier: bool per token, True goes first. stop, need: end after `need` picks for
    which `stop` holds (with `cu_seqlens`, an int32 tensor). limits: int32 picks per packed segment. Packed segments of
    `above` < length <= `upto` are worked on and others left alone; `out` is written in place of new tensors.
    """
    varlen = cu_seqlens is not None
    features = kernel is None
    device = order.device
    source = tokens if kernel is None else kernel
    assert source is not None
    if cu_seqlens is not None:
        segments, n = cu_seqlens.shape[0] - 1, source.shape[0]
    else:
        segments, n = source.shape[:2]
    if out is None:
        out = (
            torch.empty((segments, k), dtype=torch.int64, device=device),
            torch.empty((segments, k), dtype=torch.float32, device=device),
        )
    indices, gains = out
    if plan.total == 0 or k == 0:
        return out

    def strides(x: torch.Tensor | None) -> list[int]:
        if x is None:
            return [0, 0, 0]
        return [0, *x.stride()] if varlen else list(x.stride())

    diagonal = inv_norm is None
    if diagonal:
        stride_order = (order.stride(0), order.stride(1) + order.stride(2))
    else:
        order = order.contiguous()
        stride_order = (n, 1)
    rows = n if varlen else segments * n
    width = triton.cdiv(n, 16) * 16  # C in aligned rows
    factor = torch.empty((1 if varlen else segments, k, width), dtype=torch.float32, device=device)
    row = torch.empty(rows if features else 0, dtype=torch.float32, device=device)
    saved = 0 if plan.resident else rows
    residual = torch.empty(saved, dtype=torch.float32, device=device)
    progress = torch.empty((0 if plan.resident else plan.total, 8), dtype=torch.int32, device=device)
    num_warps, unroll, registers = (FEATURE_BLOCKS if features else BLOCKS)[plan.columns]
    if device.type == "cpu":
        unroll = min(unroll, INTERPRETER_UNROLL)
    options = register_limit(device, registers)
    if plan.grid and plan.resident:
        options["launch_cooperative_grid"] = True
    spans = [(-1, plan.rounds)] if plan.resident else [(r, r + 1) for r in range(-1, plan.rounds)]
    images = segments if varlen else plan.images
    with device_guard(order):
        for image in range(0, segments, images):
            programs = plan.total if varlen else min(images, segments - image) * plan.slots
            for span in spans:
                greedy_kernel[(programs,)](
                    gains if kernel is None else kernel,
                    gains if tokens is None else tokens,
                    order,
                    gains if inv_norm is None else inv_norm,
                    gains if scale is None else scale,
                    gains if tier is None else tier.contiguous().view(torch.uint8),
                    gains if stop is None else stop.contiguous().view(torch.uint8),
                    gains if limits is None else limits,
                    need if isinstance(need, torch.Tensor) else gains,
                    gains if cu_seqlens is None else cu_seqlens,
                    indices,
                    gains,
                    factor,
                    row,
                    slots,
                    residual,
                    progress,
                    *strides(kernel),
                    *strides(tokens),
                    *stride_order,
                    0 if varlen else k * width,
                    width,
                    segments,
                    n,
                    0 if tokens is None else tokens.shape[-1],
                    k,
                    need if stop is not None and isinstance(need, int) else k,
                    plan.slots,
                    plan.total,
                    image * plan.slots,
                    above,
                    n if upto is None else upto,
                    *span,
                    FEATURES=features,
                    RELEVANCE=not diagonal,
                    TIERS=tier is not None,
                    STOP=stop is not None,
                    VARLEN=varlen,
                    GRID=plan.grid,
                    RESIDENT=plan.resident,
                    TOLERANCE=RANK_TOLERANCE,
                    BN=plan.columns,
                    BG=triton.next_power_of_2(triton.cdiv(n, plan.columns)),
                    BC=unroll,
                    BR=FEATURE_ROWS,
                    BD=FEATURE_COLS,
                    num_warps=num_warps,
                    num_stages=1,
                    **options,
                )
    return out


def launch_dpp_map(kernel: torch.Tensor, k: int, *, columns: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy MAP of (B, N, N) fp32 kernels of any strides: indices (B, k) int64 in greedy order, gains (B, k) fp32."""
    plan = plan_greedy(kernel.device, kernel.shape[0], kernel.shape[1], k, columns=columns)
    return launch_greedy(kernel, k, plan, plan.slot_buffer(kernel.device).zero_(), kernel=kernel)


def _table_entry(columns: int, features: bool, grid: bool, dtype: torch.dtype, mode: str) -> None:
    """A launch of one variant, on any device: images of three blocks, or of one."""
    varlen = mode in ("packed", "packed tiers")
    n, k = (3 * columns if grid else columns), 64
    shape = (2 * n,) if varlen else (2, n)
    slots, total = slot_count(2, shape[-1], columns, varlen)
    plan = Plan(columns, slots, total, grid, True, 2, k + EXTRA_ROUNDS)
    arguments: dict = {}
    if mode == "diagonal":
        order = torch.empty((2, n, n), dtype=torch.float32, device="meta")
        arguments["kernel"] = order
    else:
        order = torch.empty(shape, dtype=torch.float32, device="meta")
        arguments |= {"inv_norm": order, "scale": order}
        if features:
            arguments["tokens"] = torch.empty((*shape, 1024), dtype=dtype, device="meta")
        else:
            arguments["kernel"] = torch.empty((*shape, n), dtype=torch.float32, device="meta")
    if mode in ("stop", "packed"):
        arguments |= {"stop": torch.empty(shape, dtype=torch.bool, device="meta"), "need": 48}
    if mode in ("tiers", "packed tiers"):
        arguments["tier"] = torch.empty(shape, dtype=torch.bool, device="meta")
    if varlen:
        counts = torch.empty(2, dtype=torch.int32, device="meta")
        arguments |= {"cu_seqlens": torch.empty(3, dtype=torch.int32, device="meta"), "limits": counts}
        if mode == "packed":
            arguments["need"] = counts
    launch_greedy(order, k, plan, plan.slot_buffer(order.device), **arguments)


LAUNCH_TABLE = tuple(
    (f"{columns} {mode}{' grid' if grid else ''}", partial(_table_entry, columns, False, grid, torch.float32, mode))
    for columns in BLOCKS
    for grid in (False, True)
    for mode in ("diagonal", "stop", "tiers", "packed", "packed tiers")
) + tuple(
    (f"{columns} {mode} {str(dtype)[6:]}", partial(_table_entry, columns, True, True, dtype, mode))
    for columns in FEATURE_BLOCKS
    for dtype in (torch.float32, torch.bfloat16)
    for mode in ("stop", "packed tiers")
)
