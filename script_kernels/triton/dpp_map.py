"""Greedy MAP of a determinantal point process: diagonally pivoted Cholesky, stopped after k pivots (Chen et al. 2018).

One launch does all steps of all images. A program owns a block of columns of one image, with their residuals d in
registers; rows of the factor C go to global memory as [k][N]. The step that picks j reads L[j, :] and C[:m, j] and does

    c = (L[j, :] - C[:m, j] C[:m, :]) / sqrt(d_j);   d = max(d - c c, 0);   C[m, :] = c

**Choice of the pick.** Level, value and index of a token are packed into one int64 whose maximum is the pick: levels in
their order (3: first tier, 2: rest, 1: tokens with NaN or Inf, 0: taken or absent), then the larger value, then the
lower index. The value is the residual, or, in a level whose rank is exhausted, the order key of the relevance. A round
either picks a token or finds that a level is exhausted and picks nothing, so k picks take at most k + 3 rounds.

**Several programs per image.** Each publishes the best key of its columns and then reads those of all others. A key is
never 0 and every round has its own slots, cleared beforehand: a slot that is not 0 is there, and no counter is needed.
The key is published with release semantics behind a barrier of the block, so whoever sees it finds the block's row of C
in L2; readers poll with volatile loads and read C[:m, j] past L1. They do without an acquire because that would empty
L1, where a program keeps its own columns of C. Waiting needs every program resident: a cooperative launch no larger
than the device. Where that is impossible (the interpreter, or more programs than fit) the same body runs one round per
launch, `RESIDENT=False`, and keeps its registers in memory in between.

**Repeatable and batch-invariant.** The bits of a result depend neither on how many programs share an image nor on
their width: a column is one chain of fused multiply-adds over the pivots in order, whatever block it lies in, and the
maximum of keys is exact. The dispatch is therefore free to look at the size of the batch and of the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .kernel_matrix import finite_relevance
from .tokens import device_guard, locate, order_key, slot_count, widen

RANK_TOLERANCE = 1e-6
SINGLE_WORK = 45_000  # N * k up to which one program per image beats the exchange between programs
EXTRA_ROUNDS = 3  # one per level whose rank can run out

# Columns per program -> warps, rows of C read at once.
BLOCKS = {
    64: (2, 16),
    128: (4, 16),
    256: (4, 16),
    512: (4, 16),
    1024: (8, 16),
    2048: (16, 4),
    4096: (16, 2),
}
# Rows of L made from the tokens: the tile that sums over the features has one layout for all widths.
FEATURE_BLOCKS = {128: (8, 16), 256: (8, 16), 512: (8, 16), 1024: (8, 8), 2048: (8, 4)}
FEATURE_ROWS, FEATURE_COLS = 64, 64

# In the place of a residual, which is never negative
BAD = tl.constexpr(-1.0)  # a token with NaN or Inf
TAKEN = tl.constexpr(-2.0)  # a token that is picked or does not exist


@triton.jit
def pick_keys(b_residual, p_tier, p_order, stride_order, o_n, m_n, exhausted, TIERS: tl.constexpr):
    """int64 keys of the columns, larger is better: level (2 bits), value (32), inverted index (29); 0 if not free."""
    b_level = tl.where(b_residual >= 0.0, 2, tl.where(b_residual == BAD, 1, 0))
    b_value = tl.where(b_residual >= 0.0, b_residual, 0.0).to(tl.int32, bitcast=True)
    if TIERS:
        b_tier = tl.load(p_tier + o_n, mask=m_n, other=0)
        b_level = tl.where((b_residual >= 0.0) & (b_tier != 0), 3, b_level)
    if exhausted > 1:
        b_order = order_key(tl.load(p_order + o_n.to(tl.int64) * stride_order, mask=m_n, other=0.0))
        b_value = tl.where(b_level == exhausted, b_order, b_value)
    b_key = (b_level.to(tl.int64) << 61) | ((b_value.to(tl.int64) + 0x80000000) << 29) | (0x1FFFFFFF - o_n).to(tl.int64)
    return tl.where(b_level > 0, b_key, 0)


@triton.jit
def initial_residual(p_order, stride_order, p_inv, o_n, m_n, RELEVANCE: tl.constexpr):
    """L_ii of the columns; BAD for tokens with NaN or Inf, TAKEN past the end."""
    b_order = tl.load(p_order + o_n.to(tl.int64) * stride_order, mask=m_n, other=0.0)
    if RELEVANCE:
        b_inv = tl.load(p_inv + o_n, mask=m_n, other=0.0)
        m_good = (tl.abs(b_order * b_order) < float("inf")) & (b_inv >= 0.0)
        b_residual = tl.where(b_inv > 0.0, b_order * b_order, 0.0)
    else:
        m_good = tl.abs(b_order) < float("inf")
        b_residual = tl.where(b_order > 0.0, b_order, 0.0)
    return tl.where(m_n, tl.where(m_good, b_residual, BAD), TAKEN)


@triton.jit
def feature_row(
    p_x,  # first token of the image
    p_relevance,
    p_inv,
    p_scale,
    p_row,  # fp32, written at this program's columns
    j,
    i_from,  # first column of this program
    n,
    stride_xn,
    stride_xd,
    D,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """L[j, :] from the tokens, at the columns of this program; a token with residual left is no zero row."""
    p_xj = p_x + j.to(tl.int64) * stride_xn
    b_scale_j = tl.load(p_scale + j)
    b_inv_j = tl.load(p_inv + j)
    b_r_j = finite_relevance(tl.load(p_relevance + j))
    for i_r in range(i_from, tl.minimum(i_from + BN, n), BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < n
        b_scale = tl.load(p_scale + o_r, mask=m_r, other=1.0)
        p_r = p_x + o_r.to(tl.int64) * stride_xn
        b_dot = tl.zeros([BR, BD], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = (i_d + tl.arange(0, BD)).to(tl.int64)
            m_d = o_d < D
            b_xj = tl.load(p_xj + o_d * stride_xd, mask=m_d, other=0.0)  # [BD]
            b_x = tl.load(p_r[:, None] + o_d[None, :] * stride_xd, mask=m_r[:, None] & m_d[None, :], other=0.0)
            b_dot += (widen(b_x) * b_scale[:, None]) * (widen(b_xj) * b_scale_j)[None, :]  # [BR, BD]
        b_inv = tl.load(p_inv + o_r, mask=m_r, other=0.0)
        b_r = finite_relevance(tl.load(p_relevance + o_r, mask=m_r, other=0.0))
        b_row = (tl.sum(b_dot, axis=1) * (b_inv * b_inv_j)) * (b_r * b_r_j)
        tl.store(p_row + o_r, tl.where(b_inv > 0.0, b_row, 0.0), mask=m_r)


@triton.jit
def greedy_kernel(
    p_kernel,  # fp32 L, read unless FEATURES
    p_tokens,  # read when FEATURES
    p_order,  # relevance, one per token, or L itself, whose diagonal then serves
    p_inv,  # fp32, one per token: row statistics, read when RELEVANCE
    p_scale,  # fp32, one per token: row statistics, read when FEATURES
    p_tier,  # uint8, one per token: 1 in the tier that goes first, read when TIERS
    p_stop,  # uint8, one per token: 1 if its pick counts towards `need`, read when STOP
    p_limit,  # int32 [S]: picks per segment, read when VARLEN
    p_need,  # int32 [S]: counted picks that end a segment, read when VARLEN and STOP
    p_cu,  # int32 [S + 1], read when VARLEN
    p_indices,  # int64 [S, K]
    p_gains,  # fp32 [S, K]
    p_factor,  # fp32 C, row m at m * stride_cm
    p_row,  # fp32, one per token, used when FEATURES
    p_slots,  # int64 [rounds, n_slots], cleared, used when GRID
    p_residual,  # fp32, one per token, used unless RESIDENT
    p_progress,  # int32 [n_slots, 8], used unless RESIDENT
    stride_kb,
    stride_kn,
    stride_kc,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_order_b,
    stride_order,
    stride_cb,
    stride_cm,
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
    FEATURES: tl.constexpr,
    RELEVANCE: tl.constexpr,
    TIERS: tl.constexpr,
    STOP: tl.constexpr,
    VARLEN: tl.constexpr,
    GRID: tl.constexpr,
    RESIDENT: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    PAST_L1: tl.constexpr = ".cg" if GRID else ""
    i_slot = tl.program_id(0) + i_slot0
    i_s, i_g, first, n = locate(p_cu, i_slot, S, N, slots, BN, VARLEN)
    if (i_g * BN >= n) | (n <= n_above) | (n > n_upto):
        return
    n_g = tl.cdiv(n, BN)  # programs that share this image
    i_image = i_s.to(tl.int64)
    k = K
    if VARLEN:
        k = tl.minimum(tl.minimum(tl.load(p_limit + i_s), K), n)
        if STOP:
            need = tl.load(p_need + i_s)
        p_k = p_kernel + first * stride_kn
        p_x = p_tokens + first * stride_xn
        p_o = p_order + first * stride_order
        p_c = p_factor + first
    else:
        p_k = p_kernel + i_image * stride_kb
        p_x = p_tokens + i_image * stride_xb
        p_o = p_order + i_image * stride_order_b
        p_c = p_factor + i_image * stride_cb
    p_i = p_indices + i_image * K
    p_g = p_gains + i_image * K
    p_state = p_progress + i_slot * 8
    o_n = i_g * BN + tl.arange(0, BN)
    m_n = o_n < n

    # Residuals of this program's columns; t picks, m rows of C, the level found exhausted, picks counted
    t = tl.full([], 0, tl.int32)
    m = tl.full([], 0, tl.int32)
    exhausted = tl.full([], 0, tl.int32)
    count = tl.full([], 0, tl.int32)
    top = tl.full([], 0.0, tl.float32)
    if round_from < 0:
        b_residual = initial_residual(p_o, stride_order, p_inv + first, o_n, m_n, RELEVANCE)
    else:
        b_residual = tl.load(p_residual + first + o_n, mask=m_n, other=TAKEN)
        t = tl.load(p_state)
        m = tl.load(p_state + 1)
        exhausted = tl.load(p_state + 2)
        count = tl.load(p_state + 3)
        top = tl.load(p_state + 4).to(tl.float32, bitcast=True)
    # The rank of a level is judged by the largest L_ii of it and the levels before it: `top`, what the first pick finds,
    # unless there is a second tier.
    top_rest = tl.full([], 0.0, tl.float32)
    if TIERS:
        for i_n in range(0, n, BN):
            o_a = i_n + tl.arange(0, BN)
            b_diag = initial_residual(p_o, stride_order, p_inv + first, o_a, o_a < n, RELEVANCE)
            top_rest = tl.maximum(top_rest, tl.max(b_diag, axis=0))

    best = tl.max(pick_keys(b_residual, p_tier + first, p_o, stride_order, o_n, m_n, exhausted, TIERS), axis=0)
    i_round = tl.maximum(round_from, 0)
    if GRID:
        if (round_from < 0) & (n_g > 1):
            tl.atomic_xchg(p_slots + i_slot, tl.maximum(best, 1), sem="release", scope="gpu")
    while (i_round < round_to) & (t < k) & (count < need):
        if GRID:
            if n_g > 1:
                o_g = tl.arange(0, BG)
                p_others = p_slots + tl.cast(i_round, tl.int64) * n_slots + (i_slot - i_g) + o_g
                b_keys = tl.load(p_others, mask=o_g < n_g, other=1, volatile=True)
                if RESIDENT:
                    while tl.min(b_keys, axis=0) == 0:
                        b_keys = tl.load(p_others, mask=o_g < n_g, other=1, volatile=True)
                    tl.debug_barrier()
                best = tl.max(b_keys, axis=0)
        level = (best >> 61).to(tl.int32)
        gain = (((best >> 29) & 0xFFFFFFFF) - 0x80000000).to(tl.int32).to(tl.float32, bitcast=True)
        j = 0x1FFFFFFF - (best & 0x1FFFFFFF).to(tl.int32)
        ranked = level != exhausted
        top = tl.where(i_round == 0, gain, top)
        scale = top
        if TIERS:
            scale = tl.where(level == 3, top, top_rest)
        if ranked & (gain <= TOLERANCE * scale):
            exhausted = level
        else:
            if i_g == 0:
                tl.store(p_i + t, j.to(tl.int64))
                tl.store(p_g + t, tl.where(ranked, gain, 0.0))
            b_residual = tl.where(o_n == j, TAKEN, b_residual)
            if STOP:
                count += tl.load(p_stop + first + j).to(tl.int32)
            t += 1
            if ranked & (t < k):
                if FEATURES:
                    feature_row(
                        p_x,
                        p_o,
                        p_inv + first,
                        p_scale + first,
                        p_row + first,
                        j,
                        i_g * BN,
                        n,
                        stride_xn,
                        stride_xd,
                        D,
                        BN,
                        BR,
                        BD,
                    )
                    tl.debug_barrier()
                    b_row = tl.load(p_row + first + o_n, mask=m_n, other=0.0)
                else:
                    p_kj = p_k + j.to(tl.int64) * stride_kn
                    b_row = tl.load(p_kj + o_n.to(tl.int64) * stride_kc, mask=m_n, other=0.0)
                    b_row = tl.where(tl.abs(b_row) < float("inf"), b_row, 0.0)
                b_sum = tl.zeros([BN], dtype=tl.float32)
                for i_m in range(0, m, BC):
                    for i_c in tl.static_range(BC):
                        m_c = i_m + i_c < m
                        p_cm = p_c + tl.cast(i_m + i_c, tl.int64) * stride_cm
                        b_cj = tl.load(p_cm + j, mask=m_c, other=0.0, cache_modifier=PAST_L1)
                        b_c = tl.load(p_cm + o_n, mask=o_n < tl.where(m_c, n, 0), other=0.0)
                        b_sum = tl.fma(b_c, tl.broadcast_to(b_cj, [BN]), b_sum)
                b_new = (b_row - b_sum) * tl.div_rn(1.0, tl.sqrt_rn(gain))
                b_less = tl.fma(-b_new, b_new, b_residual)
                b_less = tl.where(b_less > 0.0, b_less, 0.0)  # NaN counts as 0
                b_residual = tl.where(b_residual >= 0.0, b_less, b_residual)
                tl.store(p_c + tl.cast(m, tl.int64) * stride_cm + o_n, b_new, mask=m_n)
                m += 1
        i_round += 1
        tl.debug_barrier()  # the row of C is read by other threads in the next round
        best = tl.max(pick_keys(b_residual, p_tier + first, p_o, stride_order, o_n, m_n, exhausted, TIERS), axis=0)
        if GRID:
            if n_g > 1:
                p_mine = p_slots + tl.cast(i_round, tl.int64) * n_slots + i_slot
                tl.atomic_xchg(p_mine, tl.maximum(best, 1), sem="release", scope="gpu")

    if not RESIDENT:
        tl.store(p_residual + first + o_n, b_residual, mask=m_n)
        tl.store(p_state, t)
        tl.store(p_state + 1, m)
        tl.store(p_state + 2, exhausted)
        tl.store(p_state + 3, count)
        tl.store(p_state + 4, top.to(tl.int32, bitcast=True))
    if i_g == 0:  # ranks that were not asked for
        for i_t in range(t, K, BN):
            o_t = i_t + tl.arange(0, BN)
            tl.store(p_i + o_t, tl.full([BN], -1, tl.int64), mask=o_t < K)
            tl.store(p_g + o_t, tl.zeros([BN], tl.float32), mask=o_t < K)


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
    processors = 0
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
    if varlen:
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
    num_warps, unroll = (FEATURE_BLOCKS if features else BLOCKS)[plan.columns]
    options = {"launch_cooperative_grid": True} if plan.grid and plan.resident else {}
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
    plan = plan_greedy(kernel.device, *kernel.shape[:2], k, columns=columns)
    return launch_greedy(kernel, k, plan, plan.slot_buffer(kernel.device).zero_(), kernel=kernel)
