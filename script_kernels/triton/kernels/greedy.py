"""Greedy MAP of a determinantal point process: diagonally pivoted Cholesky, stopped after k pivots (Chen et al. 2018).

One launch does all steps of all images. A program owns a block of columns of one image, with their residuals d in
registers: BN columns and BX more, for Triton's arrays have lengths of powers of two. Rows of the factor C go to global
memory, see factor.py. The step that picks j reads L[j, :] and C[:m, j] and does

    c = (L[j, :] - C[:m, j] C[:m, :]) / sqrt(d_j);   d = max(d - c c, 0);   C[m, :] = c

Farthest points first and maximal marginal relevance are the same steps with another update, and no C:

    d = min(d, offset - slope * cos(., j)),   the first time without the old d, which is what the first pick goes by

**Choice of the pick.** Level (2 bits), value (32), inverted index (28) and stop flag of a token are packed into one
int64 whose maximum is the pick: levels in their order (3: first tier, 2: rest, 1: tokens with NaN or Inf, 0: taken or
absent), then the larger value, then the lower index; whether the pick counts comes with it. The value is the residual,
or, in a level whose rank is exhausted, the order key of the relevance. A round either picks a token or finds that a
level is exhausted and picks nothing, so k picks take at most k + 3 rounds.

**Several programs per image.** Each publishes the best key of its columns and then reads those of all others. A key is
never 0 and every round has its own slots, cleared beforehand: a slot that is not 0 is there, and no counter is needed.
The key is published with release semantics behind a barrier of the block, so the block's row of C is in L2 before it.
Readers poll with volatile loads, wait for their block at a barrier, and read C[:m, j] past L1. The memory model of PTX
would ask for an acquire in between, which empties L1, where a program keeps its own columns of C. Without it we rely on
what the hardware does: loads of a thread are issued in the order of the code, and what goes past L1 finds in L2 what
was there before the key. That the machine code is such - a fence before the exchange, polls and loads of C that no L1
serves, a barrier between them - is held by a test for every architecture that we name, not by a promise of PTX.
Waiting needs every program resident: a cooperative launch no larger than the device. Where that is impossible (the
interpreter, or more programs than fit) the same body runs one round per launch and keeps its registers in memory in
between.

**Repeatable and batch-invariant.** The bits of a result depend neither on how many programs share an image nor on their
width: a column is one chain of fused multiply-adds over the pivots in order, whatever block it lies in, and the maximum
of keys is exact. The dispatch is therefore free to look at the size of the batch and of the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .factor import project
from .layout import Layout, image_of, launch, locate
from .plan import ASKED_TWICE, MOST_TOKENS, Stage
from .rows import Rows
from .steps import (
    TAKEN,
    best_key,
    best_of_all,
    block,
    feature_row,
    flags_of,
    initial_residual,
    publish,
    reported,
    residual_after,
)

RANK_TOLERANCE = tl.constexpr(1e-6)
SHARERS = (32, 128)  # programs per image that one compiled exchange serves
FEATURE_ROWS, FEATURE_COLS = 64, 64
INTERPRETER_UNROLL = 4  # the interpreter pays for masked rows as for others

# What varies from call to call: a new value must not mean a new compilation. Rows that are ours are whole multiples of
# 16 floats, and travel divided by it, so that the compiler knows.
UNSPECIALIZED = (
    *("stride_kb", "stride_kn", "S", "N", "K", "need", "slots", "n_slots", "i_slot0", "n_above", "n_upto"),
    *("round_from", "round_to"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def greedy_kernel(
    p_kernel,  # fp32 L, or None: its rows are made of the tokens
    p_tokens,  # or None
    p_order,  # relevance, one per token, or None: the diagonal of L
    p_inv,  # fp32, one per token: row statistics, or None with L's own diagonal
    p_scale,  # fp32, one per token: row statistics, or None with L in memory
    p_unit,  # fp32 [S]: residuals are gains in squares of it; fp64 [S, 3]: unit of a gain, what is added to the first
    # and to others (0 for bad tokens all the same); or None
    p_own,  # fp32, one per token: cosine with itself as products give it; written with tokens; None without relevance
    p_start,  # fp32, one per token: what the residuals start from, NaN for bad tokens; None: L_ii
    p_weight,  # fp32, one per token: what rows of L are weighted with, or None: p_order
    p_offset,  # fp32, one per token: see above; or None: a Cholesky factor
    p_slope,
    p_tier,  # uint8, one per token: not 0 in the tier that goes first, or None
    p_stop,  # uint8, one per token: not 0 if its pick counts towards `need`, or None
    p_limit,  # int32 [S]: picks per segment, for segments
    p_need,  # int32 [S]: counted picks that end a segment, or None: `need`
    p_cu,
    p_indices,  # int64 [S, K]
    p_gains,  # fp32 [S, K]
    p_factor,  # fp32 C, (total slots, cdiv(K, BV), BN, BV) or (cdiv(K, BV), T, BV); None with p_offset
    p_row,  # fp32, one per token, with tokens
    p_slots,  # int64 [rounds, n_slots], cleared, or None: one program per image
    p_residual,  # fp32, one per token, or None: all rounds in this launch
    p_progress,  # int32 [n_slots, 8], or None likewise
    stride_kb,  # of L; with relevance L is ours, and both are given divided by 16
    stride_kn,
    stride_kc,
    strides_x,
    S,
    N,
    D,
    K,
    need,
    slots,
    n_slots,
    i_slot0,  # first slot of this launch
    n_above,  # segments of n_above < n <= n_upto tokens are worked on
    n_upto,
    round_from,  # -1: start
    round_to,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    PAST_L1: tl.constexpr = ".cg" if p_slots is not None else ""
    COLUMNS: tl.constexpr = BN + BX
    i_slot = tl.program_id(0) + i_slot0
    i_s, i_g, first, n = locate(p_cu, i_slot, S, N, slots, COLUMNS)
    if (i_g * COLUMNS >= n) | (n <= n_above) | (n > n_upto):
        return
    n_g = tl.cdiv(n, COLUMNS)  # programs that share this image
    i_image = i_s.to(tl.int64)
    k = K
    n_load = n  # columns of C and L that may be loaded: what lies past n takes no part
    # C of an image: a panel for the columns of each program; of segments: one for all
    at = i_g * COLUMNS
    if p_cu is not None:
        k = tl.minimum(tl.minimum(tl.load(p_limit + i_s), K), n)
        stride_c = tl.cast(N, tl.int64) * BV
        panel = BV * COLUMNS
    else:
        stride_c = BV * COLUMNS
        panel = tl.cast(tl.cdiv(K, BV), tl.int64) * (BV * COLUMNS)
        n_load = tl.cdiv(N, 16) * 16
    if p_factor is not None:
        p_c = p_factor + (BV * first if p_cu is not None else i_image * slots * panel)
        p_mine = p_c + i_g * panel
    if p_need is not None:
        need = tl.load(p_need + i_s)
    p_relevance = p_order
    if p_weight is not None:
        p_relevance = p_weight
    p_k = p_kernel
    n_row = n
    stride_diagonal = stride_kn
    if p_kernel is not None:
        if p_order is not None:
            stride_kb *= 16
            stride_kn *= 16
            n_row = n_load
        if p_cu is not None:
            p_k += first * stride_kn
        else:
            p_k += i_image * stride_kb
        stride_diagonal = stride_kn + stride_kc
    p_i = p_indices + i_image * K
    p_g = p_gains + i_image * K
    o_n = block(at, BN)
    m_n = o_n < n
    # Past the image's end its last column stands in: no load of C needs a mask
    o_c = tl.minimum(tl.arange(0, BN), n - 1 - at)
    o_mine = BV * o_c[:, None] + tl.arange(0, BV)[None, :]  # [BN, BV]
    b_tier = flags_of(p_tier, first, o_n, m_n)
    b_stop = flags_of(p_stop, first, o_n, m_n)
    x_mine = o_mine
    if BX > 0:  # the same of the columns past the first BN
        x_n = block(at + BN, BX)
        m_x = x_n < n
        x_c = tl.minimum(BN + tl.arange(0, BX), n - 1 - at)
        x_mine = BV * x_c[:, None] + tl.arange(0, BV)[None, :]  # [BX, BV]
        x_tier = flags_of(p_tier, first, x_n, m_x)
        x_stop = flags_of(p_stop, first, x_n, m_x)
        x_residual = initial_residual(p_start, p_order, p_inv, p_k, stride_diagonal, first, x_n, m_x)
        x_own = x_residual
        if p_own is not None:
            x_own = tl.load(p_own + first + x_n, mask=m_x, other=1.0)

    # Residuals of this program's columns; t picks, m rows of C, the level found exhausted, picks counted
    t = tl.full([], 0, tl.int32)
    m = tl.full([], 0, tl.int32)
    exhausted = tl.full([], 0, tl.int32)
    count = tl.full([], 0, tl.int32)
    top = tl.full([], 0.0, tl.float32)
    b_residual = initial_residual(p_start, p_order, p_inv, p_k, stride_diagonal, first, o_n, m_n)
    if p_progress is not None:
        p_state = p_progress + i_slot * 8
        if round_from >= 0:
            b_residual = tl.load(p_residual + first + o_n, mask=m_n, other=TAKEN)
            if BX > 0:
                x_residual = tl.load(p_residual + first + x_n, mask=m_x, other=TAKEN)
            t = tl.load(p_state)
            m = tl.load(p_state + 1)
            exhausted = tl.load(p_state + 2)
            count = tl.load(p_state + 3)
            top = tl.load(p_state + 4).to(tl.float32, bitcast=True)
    b_own = b_residual
    if p_kernel is None:
        if round_from < 0:
            p_x = image_of(p_tokens, p_cu, i_s, first, strides_x)
            feature_row(
                p_x,
                p_relevance,
                p_inv,
                p_scale,
                p_own,
                p_row,
                first,
                None,
                at,
                n,
                strides_x,
                D,
                BN,
                BR,
                BD,
            )
            tl.debug_barrier()  # and the first exchange brings it to the other programs
    elif p_own is not None:
        b_own = tl.load(p_own + first + o_n, mask=m_n, other=1.0)
    # The rank of a level is judged by the largest L_ii of it and the levels before it. That is `top`, which the first
    # pick finds, or `top_rest` for what follows a first tier.
    top_rest = tl.full([], 0.0, tl.float32)
    if p_tier is not None:
        for i_n in range(0, n, BN):
            o_a = block(i_n, BN)
            b_diag = initial_residual(p_start, p_order, p_inv, p_k, stride_diagonal, first, o_a, o_a < n)
            top_rest = tl.maximum(top_rest, tl.max(b_diag, axis=0))

    best = best_key(b_residual, b_tier, b_stop, p_order, p_k, stride_diagonal, first, o_n, m_n, exhausted)
    if BX > 0:
        other = best_key(x_residual, x_tier, x_stop, p_order, p_k, stride_diagonal, first, x_n, m_x, exhausted)
        best = tl.maximum(best, other)
    i_round = tl.maximum(round_from, 0)
    if p_slots is not None:
        publish(p_slots, i_round, n_slots, i_slot, best, n_g)
    while (i_round < round_to) & (t < k) & (count < need):
        if p_slots is not None:
            best = best_of_all(p_slots, i_round, n_slots, i_slot - i_g, best, n_g, p_progress, BG)
        level = (best >> 61).to(tl.int32)
        gain = (((best >> 29) & 0xFFFFFFFF) - 0x80000000).to(tl.int32).to(tl.float32, bitcast=True)
        j = MOST_TOKENS - 1 - ((best >> 1) & (MOST_TOKENS - 1)).to(tl.int32)
        ranked = level != exhausted
        top = tl.where(i_round == 0, gain, top)
        scale = top
        if p_tier is not None:
            scale = tl.where(level == 3, top, top_rest)
        least = RANK_TOLERANCE * scale
        if p_offset is not None:
            least = -1.0  # these have no rank to exhaust
        if ranked & (gain <= least):
            exhausted = level
        else:
            if i_g == 0:
                tl.store(p_i + t, j.to(tl.int64))
                tl.store(p_g + t, tl.where(ranked, reported(gain, level, t, p_unit, i_s), 0.0))
            b_residual = tl.where(o_n == j, TAKEN, b_residual)
            if BX > 0:
                x_residual = tl.where(x_n == j, TAKEN, x_residual)
            count += (best & 1).to(tl.int32)
            t += 1
            if ranked & (t < k) & (count < need):
                own_j = gain
                if p_kernel is None:
                    p_x = image_of(p_tokens, p_cu, i_s, first, strides_x)
                    feature_row(
                        p_x,
                        p_relevance,
                        p_inv,
                        p_scale,
                        p_own,
                        p_row,
                        first,
                        j,
                        at,
                        n,
                        strides_x,
                        D,
                        BN,
                        BR,
                        BD,
                    )
                    tl.debug_barrier()
                    b_row = tl.load(p_row + first + o_n, mask=m_n, other=0.0)
                else:
                    p_kj = p_k + j.to(tl.int64) * stride_kn
                    b_row = tl.load(p_kj + o_n.to(tl.int64) * stride_kc, mask=o_n < n_row, other=0.0)
                    if BX > 0:
                        x_row = tl.load(p_kj + x_n.to(tl.int64) * stride_kc, mask=x_n < n_row, other=0.0)
                    if p_own is not None:
                        own_j = tl.load(p_own + first + j)
                b_sum = b_row
                x_sum = b_row
                p_new = p_g
                if p_factor is not None:  # the row is asked for first and used last: it travels while C does
                    p_j = p_c + j // COLUMNS * panel + BV * (j % COLUMNS)
                    b_sum, x_sum = project(p_mine, o_mine, x_mine, p_j, m, stride_c, PAST_L1, BN, BX, BV, BC, BJ)
                    p_new = p_mine + (m // BV).to(tl.int64) * stride_c + m % BV
                after = (own_j, gain, m, p_kernel, p_own, p_factor, p_offset, p_slope, BV)
                b_residual = residual_after(b_residual, b_row, b_own, b_sum, p_new, o_n, at, first, m_n, *after)
                if BX > 0:
                    x_residual = residual_after(x_residual, x_row, x_own, x_sum, p_new, x_n, at, first, m_x, *after)
                m += 1
        i_round += 1
        tl.debug_barrier()  # the row of C is read by other threads in the next round
        best = best_key(b_residual, b_tier, b_stop, p_order, p_k, stride_diagonal, first, o_n, m_n, exhausted)
        if BX > 0:
            other = best_key(x_residual, x_tier, x_stop, p_order, p_k, stride_diagonal, first, x_n, m_x, exhausted)
            best = tl.maximum(best, other)
        if p_slots is not None:
            publish(p_slots, i_round, n_slots, i_slot, best, n_g)

    if p_progress is not None:
        tl.store(p_residual + first + o_n, b_residual, mask=m_n)
        if BX > 0:
            tl.store(p_residual + first + x_n, x_residual, mask=m_x)
        tl.store(p_state, t)
        tl.store(p_state + 1, m)
        tl.store(p_state + 2, exhausted)
        tl.store(p_state + 3, count)
        tl.store(p_state + 4, top.to(tl.int32, bitcast=True))
    if i_g == 0:  # ranks that were not asked for
        for i_t in range(t, K, BN):
            o_t = block(i_t, BN)
            tl.store(p_i + o_t, tl.full([BN], -1, tl.int64), mask=o_t < K)
            tl.store(p_g + o_t, tl.zeros([BN], tl.float32), mask=o_t < K)


def compile_options(layout: Layout, stage: Stage, device: torch.device) -> dict[str, Any]:
    """Constants and options of the kernel: of few values, for each is a compilation."""
    plan = stage.plan
    num_warps, unroll, registers = stage.block
    whole = 1 << (plan.columns.bit_length() - 1)  # Triton's arrays have lengths of powers of two
    sharers = triton.cdiv(layout.n, plan.columns) if plan.grid else 1
    # Polled keys are not the same for two threads that ask at two times. So a key has one thread, or, where 32 are all,
    # a warp has each: in between, warps would bring different maxima of the same keys.
    few, many = SHARERS[0], max(SHARERS[1], 32 * num_warps)
    one = plan.grid and (layout.packed or plan.columns < 256)  # one exchange for all that share
    widths = (many,) if one else (few, many)
    twice = plan.grid and not layout.packed and not stage.features and plan.columns in ASKED_TWICE
    chunk = ASKED_TWICE[plan.columns] if twice else unroll
    if device.type == "cpu":
        chunk = min(chunk, INTERPRETER_UNROLL)
    options: dict[str, Any] = {
        "BN": whole,
        "BX": plan.columns - whole,
        "BG": next((g for g in widths if g >= sharers), triton.next_power_of_2(sharers)),
        "BC": chunk,
        "BJ": 2 * chunk if twice else chunk,
        "BV": stage.neighbours,
        "BR": FEATURE_ROWS,
        "BD": FEATURE_COLS,
        "num_warps": num_warps,
        "num_stages": 1,
        "registers": registers,
    }
    if plan.grid and plan.resident:
        options["launch_cooperative_grid"] = True
    return options


def launch_greedy(
    layout: Layout,
    order: torch.Tensor,
    k: int,
    stage: Stage,
    rows: Rows | None = None,
    *,
    kernel: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    nearest: tuple[torch.Tensor, torch.Tensor] | None = None,
    tier: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    need: int | torch.Tensor = 0,
    limits: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks tokens greedily: indices (B, k) int64 in greedy order, -1 past the last pick, and gains (B, k) fp32.

    order: relevance, one per token, with `rows`; or, without them, the kernel itself, whose diagonal is then used.
    kernel: L (B, N, N), of any strides where it is the order, or (T, W) of packed segments, in rows as `launch_pairs`
    leaves them, with its `own`; tokens: for a stage that makes the rows of L of them. unit: (S,) fp32, of the
    relevance: gains come in squares of it; or (S, 3) fp64, as weights.py makes it. start: fp32 per token, the residuals
    to start from in place of L_ii, NaN for bad tokens; weight: what the rows of L are weighted with in place of the
    order. nearest: offset and slope per token, for a choice by the nearest pick: L is then S.
    tier: bool per token, True goes first. stop, need: end after `need` picks for which `stop` holds (for packed
    segments an int32 tensor). limits: int32 picks per packed segment. `out` is written in place of new tensors.
    """
    plan, device = stage.plan, order.device
    if out is None:
        shape = (layout.segments, k)
        out = (torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device))
    if plan.total == 0 or k == 0:
        return out
    source = tokens if stage.features else kernel
    assert source is not None
    strides_k = (0, 0, 0) if stage.features else layout.strides(source)
    if rows is not None:
        order = order.contiguous()
        strides_k = (strides_k[0] // 16, strides_k[1] // 16, strides_k[2])
    columns = layout.n if layout.packed else plan.total * plan.columns
    factor = None
    if nearest is None:
        factor = torch.empty((triton.cdiv(k, stage.neighbours), columns, stage.neighbours), device=device)
    row = None
    if stage.features:
        row, own = torch.empty((2, layout.rows), device=device)
    residual = None if plan.resident else torch.empty(layout.rows, device=device)
    progress = None if plan.resident else torch.empty((plan.total, 8), dtype=torch.int32, device=device)
    options = compile_options(layout, stage, device)
    spans = [(-1, plan.rounds)] if plan.resident else [(r, r + 1) for r in range(-1, plan.rounds)]
    images = layout.segments if layout.packed else plan.images
    for image in range(0, layout.segments, images):
        programs = plan.total if layout.packed else min(images, layout.segments - image) * plan.slots
        for span in spans:
            launch(
                greedy_kernel,
                programs,
                None if stage.features else kernel,
                tokens if stage.features else None,
                None if rows is None else order,
                None if rows is None else rows.inv_norm,
                rows.scale if rows is not None and stage.features else None,
                unit,
                own,
                start,
                weight,
                *(nearest or (None, None)),
                None if tier is None else tier.view(torch.uint8),
                None if stop is None else stop.view(torch.uint8),
                limits,
                need if isinstance(need, torch.Tensor) else None,
                layout.cu_seqlens,
                *out,
                factor,
                row,
                stage.slots if plan.grid else None,
                residual,
                progress,
                *strides_k,
                layout.strides(source) if stage.features else None,
                layout.segments,
                layout.n,
                source.shape[-1] if stage.features else 0,
                k,
                need if stop is not None and isinstance(need, int) else k,
                plan.slots,
                plan.total,
                image * plan.slots,
                stage.above,
                stage.upto,
                *span,
                **options,
            )
    return out
