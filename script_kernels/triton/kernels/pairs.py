"""Every pair of tokens once: the kernel L = diag(r) S diag(r) in fp32, the sums that GSP needs, the best matches.

Products are taken on the raw input dtype and scaled afterwards: L_ij = cos(x_i, x_j) r_i r_j. `pair_kernel` computes
the tiles of S on and above the diagonal. A tile becomes L, written to both sides (and the diagonal tile's upper half to
both), so L is symmetric bit for bit; its diagonal is r_i^2 exactly, not a rounded cosine, whose rounding error would
look like residual variance to the greedy steps. What the products make of the cosine of a token with itself is kept
beside L: norms are summed in another order, and the greedy steps take the difference out. The tile's even-odd half
gives degrees and sums to the sources on both of its sides. Where no L is wanted, `match_kernel` multiplies sources
(even positions) with destinations (odd) only, a quarter of S.

What tiles contribute to a source is added up across programs by integer atomics: similarities are summed in fixed point
(2^-24), so the result is exact addition and does not depend on order, tile shape or batch. The best match travels as
one 64-bit maximum of (order key of the similarity, reversed destination).

Tensor cores truncate when they accumulate, a bias that grows with the length of the chain: for L, CHUNK columns at a
time go through one chain, and the partial sums are added in ordinary fp32.

They multiply fp32 as TF32, 11 significant bits, too few for any promise of ours. A number is therefore split into two
of these, x = high + low, and a product is (low high + high low) + high high; low low is below fp32's rounding. A step
of BD columns is a chain of its own, and its sum is added in ordinary fp32. The mixed terms have a chain each, and then
their sum, so that (i, j) and (j, i) have the same bits, and with them equal tokens before and behind a third.

The L of packed segments is (T, W): row i belongs to packed token i, its columns count from the segment's start, and a
segment longer than W has none. The host knows neither length: W bounds it, and memory is the price of not asking.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import Layout, image_of, launch, locate, order_key, saturate
from .rows import Rows, min_max, score_range, widen

CHUNK = tl.constexpr(1024)
CLEAR_BLOCK = 256
FIXED = tl.constexpr(16777216.0)  # 2^24: a tile of 64 cosines stays below 2^31
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# One row per kind of input: tile of rows and columns, depth of a step, warps, pipeline stages.
PAIR_TILES = {
    torch.bfloat16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BT": 64, "BD": 16, "num_warps": 4, "num_stages": 3},
}
MATCH_TILES = {
    torch.bfloat16: {"BM": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
    torch.float16: {"BM": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
    torch.float32: {"BM": 64, "BN": 64, "BD": 16, "num_warps": 4, "num_stages": 3},
}
PAIR_REGISTERS = 255
TF32 = torch.version.hip is None  # few of AMD's multiply it: there fp32 runs on the ordinary cores
FANOUT = 16  # programs that share one row of tiles where sums are added up


class Pairs(NamedTuple):
    relevance: torch.Tensor  # (rows,) fp32
    kernel: torch.Tensor  # fp32 L (B, N, N) or packed (T, W), in rows of whole multiples of 16 floats
    own: torch.Tensor  # (rows,) fp32: the cosine of each token with itself, by the same products as in L


@triton.jit
def rescale(b_x, b_scale):
    """Multiply by powers of two and return to the input dtype; exact for bf16, whose exponent range is that of fp32."""
    b_wide = widen(b_x) * b_scale
    if b_x.dtype == tl.bfloat16:
        b_out = (b_wide.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b_out = b_wide.to(b_x.dtype)
    return b_out


@triton.jit
def nearest_tf32(b_x):
    """Rounded to TF32's 11 significant bits, halves away from zero, as cvt.rna does it; NaN and Inf become anything."""
    return ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_pass(
    p_a,
    m_a,
    b_scale_a,  # [BM], or None: rows as they are
    p_b,
    m_b,
    b_scale_b,
    stride_d,
    D,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TF32: tl.constexpr,
):
    SPLIT: tl.constexpr = TF32 and p_a.dtype.element_ty == tl.float32
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        o_wide = o_d.to(tl.int64)
        p_at = p_a[:, None] + o_wide[None, :] * stride_d  # [BM, BD]
        p_bt = p_b[None, :] + o_wide[:, None] * stride_d  # [BD, BN]
        b_a = tl.load(p_at, mask=m_a[:, None] & m_d[None, :], other=0.0)
        b_b = tl.load(p_bt, mask=m_b[None, :] & m_d[:, None], other=0.0)
        if b_scale_a is not None:
            b_a = rescale(b_a, b_scale_a[:, None])
            b_b = rescale(b_b, b_scale_b[None, :])
        if INTERPRETED:  # the interpreter multiplies the bit patterns of bf16; products of widened values are the same
            b_a = widen(b_a)
            b_b = widen(b_b)
        if SPLIT:
            b_high_a = nearest_tf32(b_a)
            b_high_b = nearest_tf32(b_b)
            b_low_a = nearest_tf32(b_a - b_high_a)
            b_low_b = nearest_tf32(b_b - b_high_b)
            # The sums by fma: plain ones Triton would put into the chain of a product
            b_low_high = tl.dot(b_low_a, b_high_b, input_precision="tf32")
            b_high_low = tl.dot(b_high_a, b_low_b, input_precision="tf32")
            b_mixed = tl.fma(b_low_high, 1.0, b_high_low)
            b_acc = tl.fma(tl.dot(b_high_a, b_high_b, acc=b_mixed, input_precision="tf32"), 1.0, b_acc)
        else:
            b_acc = tl.dot(b_a, b_b, acc=b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def dot_tile(
    p_a,  # [BM] pointers to the first element of each row
    m_a,  # [BM]
    b_scale_a,  # [BM] fp32, from the row statistics
    p_b,  # [BN]
    m_b,  # [BN]
    b_scale_b,  # [BN]
    stride_d,
    D,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TF32: tl.constexpr,
):
    """dot(scale_i a_i, scale_j b_j) as a [BM, BN] fp32 tile, accumulated from the raw input dtype."""
    if p_a.dtype.element_ty != tl.float16:
        # A step of fp32 is a chain, and has one length: what lies beside a far row keeps its bits
        FAR: tl.constexpr = BD if p_a.dtype.element_ty == tl.float32 else 16
        m_far_a = m_a & (b_scale_a != 1.0)
        m_far_b = m_b & (b_scale_b != 1.0)
        if tl.max(m_far_a.to(tl.int32), axis=0) + tl.max(m_far_b.to(tl.int32), axis=0) > 0:
            b_acc = dot_pass(p_a, m_a, b_scale_a, p_b, m_b, b_scale_b, stride_d, D, BM, BN, FAR, TF32)
        else:
            b_acc = dot_pass(p_a, m_a, None, p_b, m_b, None, stride_d, D, BM, BN, BD, TF32)
    else:
        b_acc = dot_pass(p_a, m_a, None, p_b, m_b, None, stride_d, D, BM, BN, BD, TF32)
    return b_acc


@triton.jit
def cosine_tile(b_dot, b_inv_a, b_inv_b):
    """Cosines from a raw product: 0 wherever a zero row or a row with NaN/Inf takes part. [BM, BN]"""
    m_rows = (b_inv_a > 0.0)[:, None] & (b_inv_b > 0.0)[None, :]
    return tl.where(m_rows, b_dot * (b_inv_a[:, None] * b_inv_b[None, :]), 0.0)


@triton.jit
def finite_relevance(b_r):
    """Relevance whose square is finite, else 0 (NaN included)."""
    return tl.where(tl.abs(b_r * b_r) < float("inf"), b_r, 0.0)


@triton.jit
def tile_sums(b_sim, m_pair, threshold, AXIS: tl.constexpr):
    """Degree (int32) and fixed-point sums over the threshold and over all (int32), along AXIS of a tile."""
    m_near = m_pair & (b_sim >= threshold)
    b_fixed = (b_sim * FIXED).to(tl.int32)
    b_degree = tl.sum(m_near.to(tl.int32), axis=AXIS)
    b_near = tl.sum(tl.where(m_near, b_fixed, 0), axis=AXIS)
    b_all = tl.sum(tl.where(m_pair, b_fixed, 0), axis=AXIS)
    return b_degree, b_near, b_all


@triton.jit
def add_sums(p_sums, o_flat, m_s, rows, b_degree, b_near, b_all):
    p_degree = p_sums + o_flat
    tl.atomic_add(p_degree, b_degree.to(tl.int64), mask=m_s, sem="relaxed")
    tl.atomic_add(p_degree + rows, b_near.to(tl.int64), mask=m_s, sem="relaxed")
    tl.atomic_add(p_degree + rows + rows, b_all.to(tl.int64), mask=m_s, sem="relaxed")


@triton.jit(do_not_specialize=["n_clear", "width", "row16", "S", "N", "slots", "fan", "rows"])
def pair_kernel(
    p_tokens,
    p_inv,
    p_scale,
    p_score,  # fp32, one per token: relevance is their min-max; or None
    p_range,  # int32 (S, 2), or None without a query
    p_relevance,  # fp32, one per token: read, or written with p_score, when +inf marks a bad token
    p_kernel,  # fp32 L in rows of 16 * row16; segments of more than `width` tokens are left out
    p_own,  # fp32, one per token: cosine with itself
    p_sums,  # int64 (PLANES, rows), or None
    p_clear,  # int64 (n_clear), set to zero on the way
    p_cu,
    strides,
    n_clear,
    width,
    row16,
    S,
    N,
    D,
    slots,
    fan,
    rows,
    threshold,
    floor,  # of the relevance that is made here
    power,  # of the same, or None
    BT: tl.constexpr,
    BD: tl.constexpr,
    TF32: tl.constexpr,
    BCLEAR: tl.constexpr,
):
    """Tiles on and above the diagonal of S, every `fan`-th of one row of tiles: L, relevance and GSP's sums."""
    pid = tl.program_id(0)
    for i_clear in range(pid * BCLEAR, n_clear, tl.num_programs(0) * BCLEAR):
        o_clear = i_clear + tl.arange(0, BCLEAR)
        tl.store(p_clear + o_clear, tl.zeros([BCLEAR], dtype=tl.int64), mask=o_clear < n_clear)

    i_slot = pid // fan
    i_fan = pid - i_slot * fan
    i_s, i_m, first, n = locate(p_cu, i_slot, S, N, slots, BT)
    if p_sums is None:
        n = tl.where(n <= width, n, 0)
    if i_m * BT >= n:
        return
    p_x = image_of(p_tokens, p_cu, i_s, first, strides)

    # Everything about the row of tiles is recomputed: what is kept across tiles costs registers in the products.
    for i_n in tl.range(i_m + i_fan, tl.cdiv(n, BT), fan, disable_licm=True):
        o_m = i_m * BT + tl.arange(0, BT)
        m_m = o_m < n
        p_m = p_x + tl.cast(i_m * BT, tl.int64) * strides[1] + tl.arange(0, BT).to(tl.int64) * strides[1]
        b_scale_m = tl.load(p_scale + first + o_m, mask=m_m, other=1.0)
        o_n = i_n * BT + tl.arange(0, BT)
        m_n = o_n < n
        p_n = p_x + tl.cast(i_n * BT, tl.int64) * strides[1] + tl.arange(0, BT).to(tl.int64) * strides[1]
        b_scale_n = tl.load(p_scale + first + o_n, mask=m_n, other=1.0)
        b_dot = tl.zeros([BT, BT], dtype=tl.float32)
        for i_d in range(0, D, CHUNK):  # short chains: tensor cores truncate as they accumulate
            o_d = tl.cast(i_d, tl.int64) * strides[2]
            d = tl.minimum(D - i_d, CHUNK)
            b_dot += dot_tile(p_m + o_d, m_m, b_scale_m, p_n + o_d, m_n, b_scale_n, strides[2], d, BT, BT, BD, TF32)

        b_inv_m = tl.load(p_inv + first + o_m, mask=m_m, other=0.0)
        b_inv_n = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
        if p_score is not None:
            low, high = score_range(p_range, i_s)
            b_score_m = tl.load(p_score + first + o_m, mask=m_m, other=0.0)
            b_r_m = min_max(b_score_m, low, high, floor, power)
            b_r_n = min_max(tl.load(p_score + first + o_n, mask=m_n, other=0.0), low, high, floor, power)
            if i_n == i_m:
                tl.store(p_relevance + first + o_m, tl.where(b_score_m == float("inf"), b_score_m, b_r_m), mask=m_m)
        else:
            b_r_m = finite_relevance(tl.load(p_relevance + first + o_m, mask=m_m, other=0.0))
            b_r_n = finite_relevance(tl.load(p_relevance + first + o_n, mask=m_n, other=0.0))
        b_sim = cosine_tile(b_dot, b_inv_m, b_inv_n)  # [BT, BT]

        if p_sums is not None:
            m_source = m_m & (o_m % 2 == 0)
            m_other = m_n & (o_n % 2 == 1)
            b_degree, b_near, b_all = tile_sums(b_sim, m_source[:, None] & m_other[None, :], threshold, 1)
            add_sums(p_sums, first + o_m // 2, m_source, rows, b_degree, b_near, b_all)
            if i_n > i_m:
                m_source = m_n & (o_n % 2 == 0)
                m_other = m_m & (o_m % 2 == 1)
                b_degree, b_near, b_all = tile_sums(b_sim, m_other[:, None] & m_source[None, :], threshold, 0)
                add_sums(p_sums, first + o_n // 2, m_source, rows, b_degree, b_near, b_all)

        if n <= width:
            # Each factor commutes, so (i, j) and (j, i) round alike
            b_k = b_sim * (b_r_m[:, None] * b_r_n[None, :])
            b_diag = tl.where(b_inv_m > 0.0, b_r_m * b_r_m, 0.0)
            m_own = o_m[:, None] == o_n[None, :]
            if i_n == i_m:
                tl.store(p_own + first + o_m, tl.sum(tl.where(m_own, b_sim, 0.0), axis=1), mask=m_m)
            b_k = tl.where(m_own, b_diag[:, None], b_k)
            m_k = m_m[:, None] & m_n[None, :]
            o_t = tl.arange(0, BT)
            stride_k = row16 * 16
            p_k = p_kernel + first * stride_k
            p_upper = p_k + (tl.cast(i_m, tl.int64) * stride_k + i_n) * BT + (o_t[:, None] * stride_k + o_t[None, :])
            p_lower = p_k + (tl.cast(i_n, tl.int64) * stride_k + i_m) * BT + (o_t[None, :] * stride_k + o_t[:, None])
            tl.store(p_upper, b_k, mask=m_k & (o_m[:, None] <= o_n[None, :]))
            tl.store(p_lower, b_k, mask=m_k & (o_m[:, None] < o_n[None, :]))


@triton.jit
def round_sizes(p_cu, n, keep, drop_bits, rounds, at_round):
    """Tokens left before round `at_round` and the number it drops: the quota is spread over the rounds.

    GSP keeps `keep` tokens of images, and n - floor(gsp_drop * n) of segments, in double arithmetic.
    """
    if p_cu is not None:
        share = drop_bits.to(tl.int64).to(tl.float64, bitcast=True)
        keep = n - tl.floor(n.to(tl.float64) * share).to(tl.int32)
    left = n - keep
    drop = tl.cdiv(left, rounds)
    for i_round in range(0, at_round):
        n = n - drop
        left = left - drop
        drop = tl.cdiv(left, rounds - i_round - 1)
    return n, drop


@triton.jit(do_not_specialize=["S", "N", "slots", "splits", "rows", "keep", "drop_bits", "rounds", "at_round"])
def match_kernel(
    p_tokens,
    p_inv,
    p_scale,
    p_list,  # int32 survivors of each segment, ascending; None in round 0
    p_sums,  # int64 (PLANES, rows), the fourth plane for the best match
    p_cu,
    strides,
    S,
    N,
    D,
    slots,
    splits,
    rows,
    keep,
    drop_bits,
    rounds,
    at_round,
    threshold,
    PLANES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TF32: tl.constexpr,
):
    """One tile of sources against every `splits`-th tile of destinations; adds to the integer sums of its sources."""
    i_slot = tl.program_id(0) // splits
    i_split = tl.program_id(0) - i_slot * splits
    i_s, i_tile, first, n = locate(p_cu, i_slot, S, N, slots, 2 * BM)
    n, _ = round_sizes(p_cu, n, keep, drop_bits, rounds, at_round)
    sources = (n + 1) // 2
    destinations = n // 2
    tiles = tl.cdiv(destinations, BN)
    if (i_tile * BM >= sources) | (i_split >= tiles):
        return
    p_image = image_of(p_tokens, p_cu, i_s, first, strides)

    o_s = i_tile * BM + tl.arange(0, BM)
    m_s = o_s < sources
    o_a = 2 * o_s
    if p_list is not None:
        o_a = tl.load(p_list + first + o_a, mask=m_s, other=0)
    b_inv_a = tl.load(p_inv + first + o_a, mask=m_s, other=0.0)
    b_scale_a = tl.load(p_scale + first + o_a, mask=m_s, other=1.0)
    p_a = p_image + o_a.to(tl.int64) * strides[1]

    b_degree = tl.zeros([BM], dtype=tl.int32)
    b_near = tl.zeros([BM], dtype=tl.int64)
    b_all = tl.zeros([BM], dtype=tl.int64)
    b_best = tl.full([BM], -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    for i_t in range(i_split, tiles, splits):
        o_t = i_t * BN + tl.arange(0, BN)
        m_t = o_t < destinations
        o_b = 2 * o_t + 1
        if p_list is not None:
            o_b = tl.load(p_list + first + o_b, mask=m_t, other=0)
        b_inv_b = tl.load(p_inv + first + o_b, mask=m_t, other=0.0)
        b_scale_b = tl.load(p_scale + first + o_b, mask=m_t, other=1.0)
        p_b = p_image + o_b.to(tl.int64) * strides[1]
        b_dot = dot_tile(p_a, m_s, b_scale_a, p_b, m_t, b_scale_b, strides[2], D, BM, BN, BD, TF32)
        b_sim = cosine_tile(b_dot, b_inv_a, b_inv_b)  # [BM, BN]
        m_pair = m_s[:, None] & m_t[None, :]
        b_tile_degree, b_tile_near, b_tile_all = tile_sums(b_sim, m_pair, threshold, 1)
        b_degree += b_tile_degree
        b_near += b_tile_near
        b_all += b_tile_all
        if PLANES > 3:
            b_key = tl.where(m_pair, order_key(b_sim), -0x7FFFFFFF)
            b_max = tl.max(b_key, axis=1)
            b_arg = tl.min(tl.where(b_key == b_max[:, None], o_b[None, :], 0x7FFFFFFF), axis=1)
            b_best = tl.maximum(b_best, (b_max.to(tl.int64) << 32) | (0x7FFFFFFF - b_arg).to(tl.int64))
    add_sums(p_sums, first + o_s, m_s, rows, b_degree, b_near, b_all)
    if PLANES > 3:
        tl.atomic_max(p_sums + first + o_s + rows + rows + rows, b_best, mask=m_s, sem="relaxed")


def launch_pairs(
    tokens: torch.Tensor,
    layout: Layout,
    rows: Rows,
    relevance: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
    *,
    threshold: float = 0.0,
    floor: float = 0.0,
    power: float = 1.0,
    width: int | None = None,
    clear: torch.Tensor | None = None,
) -> Pairs:
    """Relevance and L in one launch, which adds to `rows.sums` if there are any.

    relevance: one per token, fp32; without it, it is made of `rows.score` and their `reach` (`MeanQuery.reach`, None:
    no query), not below `floor`, to the power of `power`, and +inf marks bad tokens. width: of L; images have it whole
    or, if they are too long, not at all; what lies past a segment's length is not written. `clear` is an int64 buffer
    that the same launch sets to zero.
    """
    sums = rows.sums
    scored = relevance is None
    relevance = torch.empty_like(rows.inv_norm) if relevance is None else relevance.contiguous()
    width = layout.width if width is None else width
    tile = PAIR_TILES[tokens.dtype]
    slots, total = layout.slots(tile["BT"])
    fan = triton.cdiv(width, tile["BT"]) if sums is None else min(triton.cdiv(layout.n, tile["BT"]), FANOUT)
    row16 = triton.cdiv(width, 16)
    shape = (layout.n, 16 * row16) if layout.packed else (layout.segments, width, 16 * row16)
    kernel = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    pairs = Pairs(relevance, kernel, torch.empty_like(rows.inv_norm))
    if total * fan == 0:
        return pairs
    launch(
        pair_kernel,
        total * fan,
        tokens,
        rows.inv_norm,
        rows.scale,
        rows.score if scored else None,
        reach,
        *pairs,
        sums,
        clear,
        layout.cu_seqlens,
        layout.strides(tokens),
        0 if clear is None else clear.numel(),
        width,
        row16,
        layout.segments,
        layout.n,
        tokens.shape[-1],
        slots,
        fan,
        layout.rows,
        saturate(threshold),
        float(floor),
        None if power == 1 else float(power),
        BCLEAR=CLEAR_BLOCK,
        TF32=TF32,
        registers=PAIR_REGISTERS,
        **tile,
    )
    return pairs


def launch_match(
    tokens: torch.Tensor,
    layout: Layout,
    rows: Rows,
    threshold: float,
    *,
    survivors: torch.Tensor | None = None,
    keep: int = 0,
    drop_bits: int = 0,
    rounds: int = 1,
    at_round: int = 0,
) -> None:
    """Adds degree and sums of round `at_round` to `rows.sums` (cleared before), with a fourth plane the best match."""
    sums = rows.sums
    assert sums is not None
    tile = MATCH_TILES[tokens.dtype]
    slots, total = layout.slots(2 * tile["BM"])
    splits = max(1, min(FANOUT, triton.cdiv(layout.n // 2, tile["BN"])))
    launch(
        match_kernel,
        total * splits,
        tokens,
        rows.inv_norm,
        rows.scale,
        survivors,
        sums,
        layout.cu_seqlens,
        layout.strides(tokens),
        layout.segments,
        layout.n,
        tokens.shape[-1],
        slots,
        splits,
        layout.rows,
        keep,
        drop_bits,
        rounds,
        at_round,
        saturate(threshold),
        PLANES=len(sums),
        TF32=TF32,
        registers=PAIR_REGISTERS,
        **tile,
    )
