"""Choosing: GSP's rounds, the outputs of the bipartite matching, the intersection of ranking and mask, counts.

A round of GSP turns the integer sums of the sources into redundancy, finds the q-th largest by its digits (16 counts at
a time, no sort), drops what lies above it and, among the equal, the highest indices, and writes the list of survivors.
Every round has a size known beforehand, so nothing returns to the host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from script_kernels.options import GspOptions

from .layout import Layout, double_bits, from_order_key, launch, locate, order_key, saturate, segment
from .pairs import FIXED, launch_match, round_sizes
from .rows import Rows

BLOCK_SOURCES, SELECT_WARPS = 512, 8
BLOCK_FINISH = 256
BLOCK_RANKS, INTERSECT_WARPS = 1024, 4
PLACED = 16  # counts per launch


@triton.jit
def load_sums(p_sums, o_flat, m_s, rows, destinations):
    """Degree (int32), mean over the near ones and density (fp32) of each source from its integer sums."""
    p_degree = p_sums + o_flat
    b_degree = tl.load(p_degree, mask=m_s, other=0).to(tl.int32)
    b_near = tl.load(p_degree + rows, mask=m_s, other=0).to(tl.float32)
    b_all = tl.load(p_degree + rows + rows, mask=m_s, other=0).to(tl.float32)
    b_mean = b_near / (tl.maximum(b_degree, 1).to(tl.float32) * FIXED)
    b_density = b_all / (tl.maximum(destinations, 1).to(tl.float32) * FIXED)
    return b_degree, b_mean, b_density


@triton.jit(do_not_specialize=["S", "N", "slots", "rows"])
def finish_kernel(p_sums, p_best, p_match, p_degree, p_mean, p_density, S, N, slots, rows, BLOCK: tl.constexpr):
    """The five outputs per source token from the integer sums."""
    i_s, i_tile, first, n = locate(None, tl.program_id(0), S, N, slots, 2 * BLOCK)
    sources = (n + 1) // 2
    destinations = n // 2
    o_s = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < sources
    b_degree, b_mean, b_density = load_sums(p_sums, first + o_s, m_s, rows, destinations)
    b_packed = tl.load(p_sums + first + o_s + rows + rows + rows, mask=m_s, other=0)
    b_best = from_order_key((b_packed >> 32).to(tl.int32))
    b_match = 0x7FFFFFFF - (b_packed & 0x7FFFFFFF).to(tl.int32)
    m_any = destinations > 0
    o_out = i_s.to(tl.int64) * sources + o_s
    tl.store(p_best + o_out, tl.where(m_any, b_best, 0.0), mask=m_s)
    tl.store(p_match + o_out, tl.where(m_any, b_match, -1), mask=m_s)
    tl.store(p_degree + o_out, b_degree, mask=m_s)
    tl.store(p_mean + o_out, b_mean, mask=m_s)
    tl.store(p_density + o_out, b_density, mask=m_s)


@triton.jit(do_not_specialize=["N", "rows", "keep", "drop_bits", "rounds", "at_round", "min_degree"])
def select_kernel(
    p_sums,  # (PLANES, rows) int64; left cleared
    p_list,  # int32 survivors of each segment before this round; None in round 0
    p_next,  # int32 survivors after it; None after the last
    p_mask,  # uint8, one per token
    p_redundancy,  # fp32, one per token
    p_cu,
    N,
    rows,
    keep,
    drop_bits,
    rounds,
    at_round,
    threshold,
    gamma,
    min_degree,
    BS: tl.constexpr,
):
    """One image per program: redundancy of the sources of this round, and the round's quota dropped."""
    first, n = segment(p_cu, tl.program_id(0), N)
    n, drop = round_sizes(p_cu, n, keep, drop_bits, rounds, at_round)
    sources = (n + 1) // 2
    destinations = n // 2
    drop = tl.minimum(drop, sources)

    # rho = degree * exp(gamma * (mean - threshold)); below min_degree half of it plus half the density.
    # Its unsigned order key takes the place of the degree in p_sums.
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        m_s = o_s < sources
        b_degree, b_mean, b_density = load_sums(p_sums, first + o_s, m_s, rows, destinations)
        b_rho = tl.where(b_degree > 0, b_degree.to(tl.float32) * tl.exp(gamma * (b_mean - threshold)), 0.0)
        b_rho = tl.where(b_degree >= min_degree, b_rho, 0.5 * b_rho + 0.5 * b_density)
        o_source = 2 * o_s
        o_other = 2 * o_s + 1
        if p_list is not None:
            o_source = tl.load(p_list + first + o_source, mask=m_s, other=0)
        else:
            tl.store(p_redundancy + first + o_other, tl.zeros_like(b_rho), mask=o_s < destinations)
        tl.store(p_redundancy + first + o_source, b_rho, mask=m_s)
        tl.store(p_sums + first + o_s, order_key(b_rho).to(tl.int64) + 0x80000000, mask=m_s)
    tl.debug_barrier()

    # `bar`: the drop-th largest key, four bits at a time from the top
    bar = tl.full([], 0, dtype=tl.int64)
    o_digit = tl.arange(0, 16)
    for i_digit in tl.static_range(8):
        b_bar = bar + (o_digit.to(tl.int64) << (28 - 4 * i_digit))  # [16]
        b_count = tl.zeros([16], dtype=tl.int32)
        for i_c in range(0, sources, BS):
            o_s = i_c + tl.arange(0, BS)
            b_key = tl.load(p_sums + first + o_s, mask=o_s < sources, other=-1)
            b_count += tl.sum((b_key[:, None] >= b_bar[None, :]).to(tl.int32), axis=0)
        digit = tl.sum((b_count >= drop).to(tl.int32), axis=0) - 1
        bar += digit.to(tl.int64) << (28 - 4 * i_digit)

    above = 0
    equal = 0
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        b_key = tl.load(p_sums + first + o_s, mask=o_s < sources, other=-1)
        above += tl.sum((b_key > bar).to(tl.int32), axis=0)
        equal += tl.sum((b_key == bar).to(tl.int32), axis=0)
    spared = equal - (drop - above)  # of the equal ones, the first `spared` stay

    equal = 0
    dropped = 0
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        m_s = o_s < sources
        m_d = o_s < destinations
        b_key = tl.load(p_sums + first + o_s, mask=m_s, other=-1)
        m_equal = b_key == bar
        b_equal = tl.cumsum(m_equal.to(tl.int32), axis=0) + equal
        m_drop = (b_key > bar) | (m_equal & (b_equal > spared))
        b_dropped = tl.cumsum(m_drop.to(tl.int32), axis=0) + dropped
        o_source = 2 * o_s
        o_other = 2 * o_s + 1
        if p_list is not None:
            o_source = tl.load(p_list + first + o_source, mask=m_s, other=0)
            o_other = tl.load(p_list + first + o_other, mask=m_d, other=0)
        else:
            tl.store(p_mask + first + o_other, tl.full([BS], 1, dtype=tl.uint8), mask=m_d)
        tl.store(p_mask + first + o_source, tl.where(m_drop, 0, 1).to(tl.uint8), mask=m_s)
        if p_next is not None:
            b_before = b_dropped - m_drop.to(tl.int32)
            tl.store(p_next + first + 2 * o_s - b_before, o_source, mask=m_s & (m_drop == 0))
            tl.store(p_next + first + 2 * o_s + 1 - b_dropped, o_other, mask=m_d)
            b_zero = tl.zeros([BS], dtype=tl.int64)
            tl.store(p_sums + first + o_s, b_zero, mask=m_s)
            tl.store(p_sums + first + o_s + rows, b_zero, mask=m_s)
            tl.store(p_sums + first + o_s + rows + rows, b_zero, mask=m_s)
        equal += tl.sum(m_equal.to(tl.int32), axis=0)
        dropped += tl.sum(m_drop.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["N", "K", "keep"])
def intersect_kernel(
    p_ranking,  # (S, K) int64, best first, -1 past its end
    p_mask,  # uint8, one per token, or None: all count
    p_flag,  # uint8, one per token, scratch
    p_keep,  # (S,) int32, for segments
    p_out,  # int64, `keep` per image
    p_cu,
    N,
    K,
    keep,
    UNION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One image per program: the first `keep` ranked tokens in the mask, filled up from the rest, ascending.

    UNION: all that the mask has, at most `keep`, ranked or not, filled up from the ranking's start.
    """
    i_s = tl.program_id(0)
    first, n = segment(p_cu, i_s, N)
    i_out = i_s.to(tl.int64) * keep
    i_base = first * 0
    if p_cu is not None:
        i_base = first
        i_out = first * 0
        for i_c in range(0, i_s, BLOCK):
            o_s = i_c + tl.arange(0, BLOCK)
            i_out += tl.sum(tl.load(p_keep + o_s, mask=o_s < i_s, other=0).to(tl.int64), axis=0)
        keep = tl.load(p_keep + i_s)

    hits = 0
    for i_c in range(0, n, BLOCK):
        o_n = i_c + tl.arange(0, BLOCK)
        b_flag = tl.zeros([BLOCK], dtype=tl.uint8)
        if UNION:
            b_flag = (tl.load(p_mask + first + o_n, mask=o_n < n, other=0) != 0).to(tl.uint8)
            hits += tl.sum(b_flag.to(tl.int32), axis=0)
        tl.store(p_flag + first + o_n, b_flag, mask=o_n < n)
    if (p_mask is not None) and (not UNION):
        for i_c in range(0, K, BLOCK):
            o_k = i_c + tl.arange(0, BLOCK)
            b_j = tl.load(p_ranking + i_s.to(tl.int64) * K + o_k, mask=o_k < K, other=-1)
            b_in = tl.load(p_mask + first + b_j, mask=(b_j >= 0) & (b_j < n), other=0)
            hits += tl.sum((b_in != 0).to(tl.int32), axis=0)
    fill = tl.maximum(keep - hits, 0)
    tl.debug_barrier()

    inside = 0
    outside = 0
    for i_c in range(0, K, BLOCK):
        o_k = i_c + tl.arange(0, BLOCK)
        b_j = tl.load(p_ranking + i_s.to(tl.int64) * K + o_k, mask=o_k < K, other=-1)
        m_j = (b_j >= 0) & (b_j < n)
        m_in = m_j & False
        if p_mask is not None:
            m_in = m_j & (tl.load(p_mask + first + b_j, mask=m_j, other=0) != 0)
        m_out = m_j & (m_in == 0)
        b_in = tl.cumsum(m_in.to(tl.int32), axis=0) + inside
        b_out = tl.cumsum(m_out.to(tl.int32), axis=0) + outside
        m_take = m_out & (b_out <= fill)
        if not UNION:
            m_take = m_take | (m_in & (b_in <= keep))
        tl.store(p_flag + first + b_j, tl.full([BLOCK], 1, dtype=tl.uint8), mask=m_take)
        inside += tl.sum(m_in.to(tl.int32), axis=0)
        outside += tl.sum(m_out.to(tl.int32), axis=0)
    tl.debug_barrier()

    taken = 0
    for i_c in range(0, n, BLOCK):
        o_n = i_c + tl.arange(0, BLOCK)
        b_flag = tl.load(p_flag + first + o_n, mask=o_n < n, other=0).to(tl.int32)
        b_place = tl.cumsum(b_flag, axis=0) + taken - 1
        tl.store(p_out + i_out + b_place, i_base + o_n, mask=b_flag != 0)
        taken += tl.sum(b_flag, axis=0)
    # A count above the segment's length, which the host could not see: no entry stays unwritten or out of range
    last = tl.minimum(tl.maximum(i_base + n - 1, 0), tl.maximum(N - 1, 0))
    for i_c in range(taken, keep, BLOCK):
        o_k = i_c + tl.arange(0, BLOCK)
        tl.store(p_out + i_out + o_k, tl.zeros([BLOCK], tl.int64) + last, mask=o_k < keep)


@triton.jit(do_not_specialize=["S", "N", "i_from", *(f"k{i}" for i in range(16)), "oversample_bits"])
def place_kernel(
    p_counts,  # (S,) int32
    p_limits,  # (S,) int32: ceil(oversample * keep), at most N
    p_bounds,  # (S + 1,) int32: ascending, within [0, N]
    p_cu,  # (S + 1,) int32: whatever the caller passed as such
    stride_cu,
    i_from,
    S,
    N,
    oversample_bits,
    k0,
    k1,
    k2,
    k3,
    k4,
    k5,
    k6,
    k7,
    k8,
    k9,
    k10,
    k11,
    k12,
    k13,
    k14,
    k15,
    BLOCK: tl.constexpr,
):
    """Writes up to 16 counts, the lengths of their rankings, and the ends of their segments.

    The host cannot check the bounds of segments without waiting for the device. Kernels take them as they are, so here
    they become what they should be: a bound is no lower than those before it, and within the tokens.
    """
    o_s = tl.arange(0, BLOCK)
    before = tl.minimum(tl.maximum(tl.load(p_cu), 0), N)
    if i_from == 0:
        tl.store(p_bounds, before)
    for i_c in range(0, i_from, BLOCK):
        b_cu = tl.load(p_cu + (i_c + 1 + o_s).to(tl.int64) * stride_cu)
        before = tl.maximum(before, tl.minimum(tl.max(b_cu, axis=0), N))
    m_s = i_from + o_s < S
    b_cu = tl.load(p_cu + (i_from + 1 + o_s).to(tl.int64) * stride_cu, mask=m_s, other=0)
    b_upto = tl.max(tl.where(o_s[None, :] <= o_s[:, None], b_cu[None, :], 0), axis=1)
    tl.store(p_bounds + i_from + 1 + o_s, tl.maximum(before, tl.minimum(b_upto, N)), mask=m_s)
    b_keep = tl.zeros([BLOCK], dtype=tl.int32)
    b_keep = tl.where(o_s == 0, k0, b_keep)
    b_keep = tl.where(o_s == 1, k1, b_keep)
    b_keep = tl.where(o_s == 2, k2, b_keep)
    b_keep = tl.where(o_s == 3, k3, b_keep)
    b_keep = tl.where(o_s == 4, k4, b_keep)
    b_keep = tl.where(o_s == 5, k5, b_keep)
    b_keep = tl.where(o_s == 6, k6, b_keep)
    b_keep = tl.where(o_s == 7, k7, b_keep)
    b_keep = tl.where(o_s == 8, k8, b_keep)
    b_keep = tl.where(o_s == 9, k9, b_keep)
    b_keep = tl.where(o_s == 10, k10, b_keep)
    b_keep = tl.where(o_s == 11, k11, b_keep)
    b_keep = tl.where(o_s == 12, k12, b_keep)
    b_keep = tl.where(o_s == 13, k13, b_keep)
    b_keep = tl.where(o_s == 14, k14, b_keep)
    b_keep = tl.where(o_s == 15, k15, b_keep)
    share = oversample_bits.to(tl.int64).to(tl.float64, bitcast=True)
    b_limit = tl.minimum(tl.ceil(b_keep.to(tl.float64) * share), N.to(tl.float64)).to(tl.int32)
    tl.store(p_counts + i_from + o_s, b_keep, mask=m_s)
    tl.store(p_limits + i_from + o_s, b_limit, mask=m_s)


def launch_finish(sums: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    """Best, match, degree, mean, density per source token, each (B, ceil(N / 2)), from four planes of sums."""
    shape = (layout.segments, (layout.n + 1) // 2)
    dtypes = (torch.float32, torch.int32, torch.int32, torch.float32, torch.float32)
    found = tuple(torch.empty(shape, dtype=dtype, device=sums.device) for dtype in dtypes)
    slots, total = layout.slots(2 * BLOCK_FINISH)
    sizes = (layout.segments, layout.n, slots, layout.rows)
    launch(finish_kernel, total, sums, *found, *sizes, BLOCK=BLOCK_FINISH)
    return found


def launch_select(
    tokens: torch.Tensor, layout: Layout, rows: Rows, options: GspOptions, keep: int, gsp_drop: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (rows,) bool and redundancy (rows,) fp32, given the sums of round 0. Two launches a round, less one.

    Images keep `keep` tokens, packed segments n - floor(gsp_drop * n), of all T tokens together `keep`.
    """
    assert rows.sums is not None
    mask = torch.empty(layout.rows, dtype=torch.bool, device=tokens.device)
    redundancy = torch.empty(layout.rows, dtype=torch.float32, device=tokens.device)
    # A round drops one token at least; once there is nothing to drop, further rounds would score the same split.
    rounds = min(options.rounds, layout.n - keep + 1)
    drop_bits = double_bits(gsp_drop)
    before: torch.Tensor | None = None
    spare: torch.Tensor | None = None
    for at_round in range(rounds):
        if before is not None:
            sizes = {"keep": keep, "drop_bits": drop_bits, "rounds": rounds, "at_round": at_round}
            launch_match(tokens, layout, rows, options.threshold, survivors=before, **sizes)
        after = None
        if at_round < rounds - 1:
            after = spare if spare is not None else torch.empty_like(redundancy, dtype=torch.int32)
        launch(
            select_kernel,
            layout.segments,
            rows.sums,
            before,
            after,
            mask.view(torch.uint8),
            redundancy,
            layout.cu_seqlens,
            layout.n,
            layout.rows,
            keep,
            drop_bits,
            rounds,
            at_round,
            saturate(options.threshold),
            saturate(options.gamma),
            options.min_degree,
            BS=BLOCK_SOURCES,
            num_warps=SELECT_WARPS,
        )
        before, spare = after, before
    return mask, redundancy


def launch_intersect(
    ranking: torch.Tensor,
    layout: Layout,
    mask: torch.Tensor | None,
    keep: int,
    total: int,
    counts: torch.Tensor | None = None,
    *,
    union: bool = False,
) -> torch.Tensor:
    """(total,) int64: per segment the ranked tokens in `mask` (all without one), filled from the rest, ascending.

    union: all that are in `mask`, which are no more than are kept, filled from the ranking.
    """
    segments, k = ranking.shape
    flag = torch.empty(layout.rows, dtype=torch.uint8, device=ranking.device)
    out = torch.empty(total, dtype=torch.int64, device=ranking.device)
    launch(
        intersect_kernel,
        segments,
        ranking,
        None if mask is None else mask.view(torch.uint8),
        flag,
        counts,
        out,
        layout.cu_seqlens,
        layout.n,
        k,
        keep,
        UNION=union,
        BLOCK=BLOCK_RANKS,
        num_warps=INTERSECT_WARPS,
    )
    return out


def launch_place(
    keep: Sequence[int], cu_seqlens: torch.Tensor, oversample: float, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`keep` and min(n, ceil(oversample * keep)) (S,), and sound bounds (S + 1,): int32, without a copy from the host.

    Counts travel as kernel arguments: a copy from pageable memory would synchronise, and no CUDA graph would keep it.
    """
    count, device = len(keep), cu_seqlens.device
    counts, limits, bounds = (torch.empty(size, dtype=torch.int32, device=device) for size in (count, count, count + 1))
    for start in range(0, count, PLACED):
        some = list(keep[start : start + PLACED])
        some += [0] * (PLACED - len(some))
        sizes = (cu_seqlens.stride(0), start, count, n, double_bits(oversample))
        launch(place_kernel, 1, counts, limits, bounds, cu_seqlens, *sizes, *some, BLOCK=PLACED, num_warps=1)
    return counts, limits, bounds
