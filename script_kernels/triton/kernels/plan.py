"""How greedy steps are spread over programs and launches, and where their rows of L come from: decided on the host."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .layout import Layout

MOST_TOKENS = tl.constexpr(1 << 28)  # what an index in a key can tell apart
SINGLE_WORK = 50_000  # N * picks up to which one program per image serves; by a model, not yet measured
EXTRA_ROUNDS = 3  # one per level whose rank can run out

# Columns per program -> warps, rows of C read at once, registers per thread. 640, an array of 512 and one of 128, is
# what fits the 576 tokens of LLaVA-1.5.
BLOCKS = {64: (2, 64, 255), 256: (4, 32, 255), 640: (4, 12, 255), 1024: (8, 12, 255), 2048: (8, 8, 255)}
# Of these, programs that share an image and have registers to ask another's columns of C for two chunks at once -> rows
# of such a chunk. Packed segments, whose rows lie a varying distance apart, have not.
ASKED_TWICE = {64: 56}
# Widths that the dispatch knows of, few, for each is a compilation: of the only program of an image, and of several
# that share one. Packed segments have lengths that the host does not know: even a short one may count as shared.
SINGLE, SHARED = (256, 640, 1024, 2048), (64, 256, 2048)
PACKED_SINGLE, PACKED_SHARED = (256, 1024), (64, 256, 1024)
# Rows of L made from the tokens: the tile that sums over the features has one layout for all widths.
FEATURE_BLOCKS = {128: (8, 16, 255), 512: (8, 16, 255), 2048: (8, 4, 255)}


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

    def keys(self) -> tuple[int, int]:
        """Shape of the room for the keys of all rounds; empty where programs exchange nothing."""
        return (self.rounds + 1 if self.grid else 0, self.total)


@dataclass(frozen=True)
class Stage:
    """The greedy steps over the images of one span of lengths; the others are left alone."""

    plan: Plan
    slots: torch.Tensor  # `plan.keys()` int64, to be cleared before the launch
    features: bool  # rows of L come from the tokens
    above: int  # lengths above < n <= upto
    upto: int

    @property
    def block(self) -> tuple[int, int, int]:
        """Warps, rows of C read at once, registers per thread."""
        return (FEATURE_BLOCKS if self.features else BLOCKS)[self.plan.columns]

    @property
    def neighbours(self) -> int:
        """Rows of C side by side in memory: four, for one load of a thread, unless threads are without a column."""
        return 4 if self.plan.columns >= 32 * self.block[0] else 1


def plan_greedy(
    device: torch.device,
    layout: Layout,
    k: int,
    *,
    features: bool = False,
    upto: int | None = None,
    columns: int | None = None,
    picks: int | None = None,
) -> Plan:
    """The dispatch table; no image or segment is longer than `upto`, and `picks` of k are expected.

    One program per image while N * k is small. Otherwise the narrowest blocks with which all programs are on the device
    at once, one program per image if there are none, and else several launches. `columns` overrides the choice.
    """
    single: tuple[int, ...] = PACKED_SINGLE if layout.packed else SINGLE
    shared: tuple[int, ...] = PACKED_SHARED if layout.packed else SHARED
    if features:
        single = shared = tuple(FEATURE_BLOCKS)
    n, segments, varlen = layout.n, layout.segments, layout.packed
    width = n if upto is None else min(n, upto)
    processors = 132 if device.type == "meta" else 0  # what is only compiled is compiled as for an H100
    if device.type == "cuda" and torch.version.hip is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    if width > MOST_TOKENS.value:
        raise ValueError(f"tokens: expected at most {MOST_TOKENS.value} per image, got {width}")
    if columns is None:
        mean = triton.cdiv(n, segments) if varlen else n
        least = mean if mean * (k if picks is None else picks) <= SINGLE_WORK else 0
        alone = next((c for c in single if c >= width), None)
        fitting = (c for c in shared if least <= c < width and layout.slots(c)[1] <= processors)
        columns = next(fitting, None) or alone or max(BLOCKS)
        if not varlen and least and alone:
            columns = alone
    slots, total = layout.slots(columns)
    grid = width > columns
    images = segments
    if grid and not varlen and slots <= processors:
        images = min(segments, processors // slots)
    resident = not grid or (total if varlen else images * slots) <= processors
    return Plan(columns, slots, total, grid, resident, images, k + EXTRA_ROUNDS)


def plan_stages(
    device: torch.device,
    layout: Layout,
    k: int,
    *,
    matrix_free: bool | None = None,
    columns: int | None = None,
    picks: int | None = None,
) -> tuple[list[Stage], torch.Tensor]:
    """The stages in order, and the room of all their keys, to be cleared: rows of L from memory, then from the tokens.

    Images up to WIDEST tokens have L in memory. `matrix_free` and `columns` override the dispatch; `picks` of k are
    expected.
    """
    width = layout.width if matrix_free is None else (0 if matrix_free else layout.n)
    spans = [(False, 0, width)] if width else []
    if width < layout.n:
        spans.append((True, width, layout.n))
    plans = [
        plan_greedy(device, layout, k, features=features, upto=upto, columns=columns, picks=picks)
        for features, _, upto in spans
    ]
    sizes = [2 * triton.cdiv(math.prod(plan.keys()), 2) for plan in plans]  # every room is aligned
    clear = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    stages = [
        Stage(plan, room[: math.prod(plan.keys())].view(plan.keys()), *span)
        for plan, room, span in zip(plans, clear.split(sizes), spans, strict=True)
    ]
    return stages, clear
