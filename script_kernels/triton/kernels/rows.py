"""One row at a time: norms and scales of the tokens, the mean query vector, raw relevance and its min-max.

A cosine needs 1/|x|, and rows of any finite magnitude are allowed: squares of fp32/bf16 values overflow above 1e19 and
vanish below 1e-23. Multiplying a row by a power of two is exact, so a row whose largest magnitude lies outside
[2^-40, 2^40] carries a scale that moves it near 1, and every other row carries exactly 1. Kernels read raw values; a
tile that meets a scale other than 1 takes a second loop that multiplies on load, and the tensor cores still see the
input dtype. The result has the same bits on either loop. fp16 never needs a scale.

The state of a row travels in its inverse norm: `inv_norm > 0` an ordinary row, `0` a zero row, `-1` a row that holds
NaN or Inf. Statistics describe the scaled row, so cos(i, j) = dot(scale_i x_i, scale_j x_j) inv_norm_i inv_norm_j.

The mean of cosines over the query's vectors is one dot product with their mean unit vector.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import Layout, from_order_key, image_of, launch, locate, order_key

SAFE = tl.constexpr(40)  # exponents up to which a row needs no scale
MOST = tl.constexpr(2.0**62)  # a scaled relevance
PLANES = 3  # integer sums of a source token: degree, similarities over the threshold, all similarities
BLOCK_ROWS, BLOCK_COLS = 4, 512
ROW_WARPS, ROW_REGISTERS = 4, 128
BLOCK_OUT = 128  # columns of the mean query vector per program
QUERY_ROWS, QUERY_COLS = 4, 1024  # read at once for the norms
QUERY_WARPS, QUERY_REGISTERS = 16, 128
QUERY_SERIAL = 32  # vectors up to which one launch finds their norms too, row after row
BLOCK_SCORES, SCORE_WARPS = 1024, 4


class Rows(NamedTuple):
    """What is known of the rows one by one; flat, entry `first + row`."""

    inv_norm: torch.Tensor  # (rows,) fp32: 1/|scale * x|; 0 for a zero row, -1 for a row holding NaN or Inf
    scale: torch.Tensor  # (rows,) fp32: an exact power of two, 1 for almost every row
    score: torch.Tensor | None = None  # (rows,) fp32: cosine with the mean query, 0 without one, +inf for a bad row
    sums: torch.Tensor | None = None  # (planes, rows) int64, cleared


class MeanQuery(NamedTuple):
    vector: torch.Tensor  # (B or 1, C) fp32
    reach: torch.Tensor  # (images, 2) int32: order keys of the lowest and the highest score, reset


@triton.jit
def widen(b_x):
    """fp32 values of a tile, exact for denormals too: bf16 is the upper half of an fp32 word."""
    if b_x.dtype == tl.bfloat16:
        b_wide = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        b_wide = b_x.to(tl.float32)
    return b_wide


@triton.jit
def row_pass(
    p_rows,  # [BR] pointers to the first element of each row
    m_rows,  # [BR]
    b_scale,  # [BR]
    stride_d,
    p_other,  # a contiguous fp32 vector, or None
    D,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """One pass over whole rows: largest magnitude (inf for a row holding NaN or Inf), and, of the scaled row without
    these, the sum of squares and the dot with `p_other`."""
    b_max = tl.zeros([BR, BC], dtype=tl.float32)
    b_sq = tl.zeros([BR, BC], dtype=tl.float32)
    b_dot = tl.zeros([BR, BC], dtype=tl.float32)
    for i_d in range(0, D, BC):
        o_d = i_d + tl.arange(0, BC)
        m_d = o_d < D
        p_x = p_rows[:, None] + o_d[None, :].to(tl.int64) * stride_d  # [BR, BC]
        b_x = widen(tl.load(p_x, mask=m_rows[:, None] & m_d[None, :], other=0.0))
        m_finite = tl.abs(b_x) < float("inf")  # false for NaN as well
        b_max = tl.maximum(b_max, tl.where(m_finite, tl.abs(b_x), float("inf")))
        b_x = tl.where(m_finite, b_x * b_scale[:, None], 0.0)
        b_sq += b_x * b_x
        if p_other is not None:
            b_q = tl.load(p_other + o_d, mask=m_d, other=0.0)  # [BC]
            b_dot += b_x * b_q[None, :]
    return tl.max(b_max, axis=1), tl.sum(b_sq, axis=1), tl.sum(b_dot, axis=1)


@triton.jit
def row_stats(p_rows, m_rows, stride_d, p_other, D, BR: tl.constexpr, BC: tl.constexpr):
    """Inverse norm (with the row's state in it), power-of-two scale and cosine-to-be `dot * inv_norm` of each row."""
    b_scale = tl.full([BR], 1.0, dtype=tl.float32)
    b_max, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, BR, BC)
    if p_rows.dtype.element_ty != tl.float16:
        # Exponent field of the largest magnitude: 0 for denormals, which 2^126 brings up to 2^-23 at least.
        b_exp = (b_max.to(tl.int32, bitcast=True) >> 23) - 127
        m_far = (b_max > 0.0) & (b_max < float("inf")) & ((b_exp > SAFE) | (b_exp < -SAFE))
        if tl.max(m_far.to(tl.int32), axis=0) > 0:
            b_near = tl.minimum(tl.maximum(-b_exp, -126), 126)
            b_scale = tl.where(m_far, ((b_near + 127) << 23).to(tl.float32, bitcast=True), b_scale)
            _, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, BR, BC)
    b_inv = tl.where(b_sq > 0.0, tl.rsqrt(tl.where(b_sq > 0.0, b_sq, 1.0)), 0.0)
    b_cos = b_dot * b_inv
    b_inv = tl.where(b_max < float("inf"), b_inv, -1.0)
    return b_inv, b_scale, b_cos


@triton.jit(do_not_specialize=["stride_q", "S", "N", "slots", "rows"])
def row_kernel(
    p_tokens,
    p_aligned,  # rows whose relevance counts in their place, or None
    p_query,  # (images or 1, C) fp32 contiguous, or None
    p_cu,
    p_inv,
    p_scale,
    p_score,  # or None
    p_range,  # (images, 2) int32 order keys of the lowest and highest score, updated with a query, else reset; or None
    p_sums,  # (PLANES, rows) int64, cleared, or None
    strides,
    strides_a,
    stride_q,
    S,
    N,
    D,
    C,
    slots,
    rows,
    PLANES: tl.constexpr,  # the fourth is that of the best match
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """One pass over the tokens (and aligned rows): norms, scales, raw relevance and its range, cleared sums."""
    i_s, i_tile, first, n = locate(p_cu, tl.program_id(0), S, N, slots, BR)
    if i_tile * BR >= n:
        return
    o_n = i_tile * BR + tl.arange(0, BR)
    m_n = o_n < n
    o_flat = first + o_n
    o_row = o_n.to(tl.int64)
    p_vector = None
    p_own = None
    if p_query is not None:
        p_vector = p_query + i_s.to(tl.int64) * stride_q
        if p_aligned is None:
            p_own = p_vector
    p_rows = image_of(p_tokens, p_cu, i_s, first, strides) + o_row * strides[1]
    b_inv, b_scale, b_score = row_stats(p_rows, m_n, strides[2], p_own, D, BR, BC)
    tl.store(p_inv + o_flat, b_inv, mask=m_n)
    tl.store(p_scale + o_flat, b_scale, mask=m_n)
    if p_score is not None:
        m_bad = b_inv < 0.0
        if p_aligned is not None:
            p_rows = image_of(p_aligned, p_cu, i_s, first, strides_a) + o_row * strides_a[1]
            b_inv, b_scale, b_score = row_stats(p_rows, m_n, strides_a[2], p_vector, C, BR, BC)
            # The range is that of the aligned rows; a token that is bad in itself still has a score there.
            m_ranged = b_inv >= 0.0
            m_bad = m_bad | (b_inv < 0.0)
        else:
            m_ranged = b_inv >= 0.0
        tl.store(p_score + o_flat, tl.where(m_bad, float("inf"), b_score), mask=m_n)
        if p_query is not None:
            b_key = order_key(b_score)
            m_ranged = m_ranged & m_n
            low = tl.min(tl.where(m_ranged, b_key, 0x7FFFFFFF), axis=0)
            high = tl.max(tl.where(m_ranged, b_key, -0x7FFFFFFF), axis=0)
            tl.atomic_min(p_range + 2 * i_s, low, sem="relaxed")
            tl.atomic_max(p_range + 2 * i_s + 1, high, sem="relaxed")
        elif p_range is not None:
            tl.store(p_range + 2 * i_s, 0x7FFFFFFF, mask=i_tile == 0)
            tl.store(p_range + 2 * i_s + 1, -0x7FFFFFFF, mask=i_tile == 0)
    if p_sums is not None:
        for i_plane in tl.static_range(PLANES):
            b_clear = tl.zeros([BR], dtype=tl.int64)
            if i_plane == 3:
                b_clear += -0x7FFFFFFFFFFFFFFF
            tl.store(p_sums + tl.full([], i_plane, tl.int64) * rows + o_flat, b_clear, mask=m_n)


@triton.jit(do_not_specialize=["images", "Q"])
def mean_query_kernel(
    p_query,
    p_mask,  # uint8, not 0 where a vector counts, or None
    p_inv,  # fp32 (queries, Q) row statistics, or None: found here, row after row
    p_scale,
    p_mean,  # (queries, C) fp32
    p_range,  # (images, 2) int32
    strides,
    strides_m,
    images,
    Q,
    C,
    sign,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
):
    """sign / M * sum of the M unmasked unit query vectors, BO columns of it; resets the range of the scores."""
    blocks = tl.cdiv(C, BO)
    pid = tl.program_id(0)
    for i_s in range(pid * BO, images, tl.num_programs(0) * BO):
        o_s = i_s + tl.arange(0, BO)
        tl.store(p_range + 2 * o_s, 0x7FFFFFFF, mask=o_s < images)
        tl.store(p_range + 2 * o_s + 1, -0x7FFFFFFF, mask=o_s < images)

    i_b = (pid // blocks).to(tl.int64)
    o_out = (pid % blocks) * BO + tl.arange(0, BO)
    m_out = o_out < C
    b_sum = tl.zeros([BO], dtype=tl.float32)
    b_count = tl.zeros([BR], dtype=tl.int32)
    p_image = p_query + i_b * strides[0]
    for i_q in range(0, Q, BR):
        o_q = i_q + tl.arange(0, BR)
        m_q = o_q < Q
        if p_mask is not None:
            m_q = m_q & (tl.load(p_mask + i_b * strides_m[0] + o_q * strides_m[1], mask=m_q, other=0) != 0)
        p_rows = p_image + o_q.to(tl.int64) * strides[1]
        if p_inv is not None:
            b_inv = tl.load(p_inv + i_b * Q + o_q, mask=m_q, other=0.0)
            b_scale = tl.load(p_scale + i_b * Q + o_q, mask=m_q, other=1.0)
        else:
            b_inv, b_scale, _ = row_stats(p_rows, m_q, strides[2], None, C, BR, BC)
        p_x = p_rows[:, None] + o_out[None, :].to(tl.int64) * strides[2]  # [BR, BO]
        b_x = widen(tl.load(p_x, mask=m_q[:, None] & m_out[None, :], other=0.0))
        b_unit = tl.where((b_inv > 0.0)[:, None], b_x * b_scale[:, None] * b_inv[:, None], 0.0)
        b_sum += tl.sum(b_unit, axis=0)
        b_count += m_q.to(tl.int32)
    count = tl.maximum(tl.sum(b_count, axis=0), 1).to(tl.float32)
    tl.store(p_mean + i_b * C + o_out, b_sum * sign / count, mask=m_out)


@triton.jit
def score_range(p_range, i_s):
    """Lowest and highest score of an image; without a query both are 0, as the scores are."""
    low = tl.full([], 0.0, tl.float32)
    high = tl.full([], 0.0, tl.float32)
    if p_range is not None:
        low = from_order_key(tl.load(p_range + 2 * i_s))
        high = from_order_key(tl.load(p_range + 2 * i_s + 1))
    return low, high


@triton.jit
def min_max(b_score, low, high, floor, power):
    """Relevance in [floor, 1] from raw scores and their range: ones if that is empty, 0 for bad rows (score +inf).

    power: of the relevance, or None for 1.
    """
    m_constant = high - low <= 1e-6
    b_r = (b_score - low) / tl.where(m_constant, 1.0, high - low)
    b_r = floor + (1.0 - floor) * tl.minimum(tl.maximum(b_r, 0.0), 1.0)
    if power is not None:
        b_power = tl.exp2(power * tl.log2(tl.where(b_r > 0.0, b_r, 1.0)))
        b_r = tl.where(b_r > 0.0, b_power, tl.where(power > 0.0, 0.0, 1.0))
    b_r = tl.where(b_score >= high, 1.0, b_r)
    b_r = tl.where(m_constant, 1.0, b_r)
    return tl.where(b_score == float("inf"), 0.0, b_r)


@triton.jit(do_not_specialize=["S", "N", "slots"])
def min_max_kernel(p_score, p_range, p_relevance, S, N, slots, BLOCK: tl.constexpr):
    i_s, i_tile, first, n = locate(None, tl.program_id(0), S, N, slots, BLOCK)
    o_n = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_score = tl.load(p_score + first + o_n, mask=m_n, other=0.0)
    low, high = score_range(p_range, i_s)
    tl.store(p_relevance + first + o_n, min_max(b_score, low, high, 0.0, None), mask=m_n)


@triton.jit(do_not_specialize=["N"])
def unit_kernel(p_relevance, p_inv, p_scaled, p_unit, N, BLOCK: tl.constexpr):
    """One image per program: its relevance in units of the power of two that brings the largest near 1, and this unit.

    The unit is 1 unless the largest finite magnitude lies outside [2^-SAFE, 2^SAFE]: squares would overflow or vanish.
    Only rows that are neither zero nor bad count for it; a finite relevance of the others keeps a finite square.
    """
    first = tl.program_id(0).to(tl.int64) * N
    largest = tl.full([], 0.0, tl.float32)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        b_r = tl.abs(tl.load(p_relevance + first + o_n, mask=o_n < N, other=0.0))
        b_counts = tl.load(p_inv + first + o_n, mask=o_n < N, other=0.0) > 0.0
        largest = tl.maximum(largest, tl.max(tl.where(b_counts & (b_r < float("inf")), b_r, 0.0), axis=0))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    near = (exponent >= -SAFE) & (exponent <= SAFE) | (largest == 0.0)
    exponent = tl.where(near, 0, tl.minimum(tl.maximum(exponent, -126), 126))
    tl.store(p_unit + tl.program_id(0), ((exponent + 127) << 23).to(tl.float32, bitcast=True))
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        b_r = tl.load(p_relevance + first + o_n, mask=o_n < N, other=0.0)
        b_scaled = tl.minimum(tl.maximum(b_r * inverse, -MOST), MOST)
        tl.store(p_scaled + first + o_n, tl.where(tl.abs(b_r) < float("inf"), b_scaled, b_r), mask=o_n < N)


def launch_unit(relevance: torch.Tensor, layout: Layout, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance (B, N) of any finite values, scaled so that its squares are finite, and the units (B,) fp32."""
    relevance = relevance.contiguous()
    scaled, unit = torch.empty_like(relevance), torch.empty(layout.segments, device=relevance.device)
    if layout.rows:
        arguments = (relevance, rows.inv_norm, scaled, unit, layout.n)
        launch(unit_kernel, layout.segments, *arguments, BLOCK=BLOCK_SCORES, num_warps=SCORE_WARPS)
    return scaled, unit


def launch_rows(
    tokens: torch.Tensor,
    layout: Layout,
    query: MeanQuery | None = None,
    aligned: torch.Tensor | None = None,
    *,
    score: bool = False,
    planes: int = 0,
    reach: torch.Tensor | None = None,
) -> Rows:
    """One launch over tokens of any strides; `aligned` is read for the relevance in their place. Without a query a
    `reach` like that of `MeanQuery` is reset."""
    device = tokens.device
    inv_norm = torch.empty(layout.rows, dtype=torch.float32, device=device)
    found = Rows(
        inv_norm,
        torch.empty_like(inv_norm),
        torch.empty_like(inv_norm) if score else None,
        torch.empty((planes, layout.rows), dtype=torch.int64, device=device) if planes else None,
    )
    vector, reach = query if query is not None else (None, reach)
    if layout.rows:
        slots, total = layout.slots(BLOCK_ROWS)
        launch(
            row_kernel,
            total,
            tokens,
            aligned,
            vector,
            layout.cu_seqlens,
            *found[:3],
            reach,
            found.sums,
            layout.strides(tokens),
            None if aligned is None else layout.strides(aligned),
            vector.stride(0) if vector is not None and vector.shape[0] > 1 else 0,
            layout.segments,
            layout.n,
            tokens.shape[-1],
            tokens.shape[-1] if aligned is None else aligned.shape[-1],
            slots,
            layout.rows,
            PLANES=planes,
            BR=BLOCK_ROWS,
            BC=BLOCK_COLS,
            num_warps=ROW_WARPS,
            registers=ROW_REGISTERS,
        )
    return found


def launch_mean_query(query: torch.Tensor, query_mask: torch.Tensor | None, negate: bool, images: int) -> MeanQuery:
    """The mean unit vector of each query (B or 1, Q, C), and the range of the scores, reset.

    One launch, and with many vectors one before it, which takes their norms all at once.
    """
    batch, q, c = query.shape
    mask = None
    if query_mask is not None:
        batch = max(batch, query_mask.shape[0])
        query = query.expand(batch, q, c)
        mask = query_mask.expand(batch, q).view(torch.uint8)
    mean = torch.empty((batch, c), dtype=torch.float32, device=query.device)
    reach = torch.empty((images, 2), dtype=torch.int32, device=query.device)
    many = q > QUERY_SERIAL
    rows = launch_rows(query, Layout.of(query)) if many else None
    launch(
        mean_query_kernel,
        batch * triton.cdiv(c, BLOCK_OUT),
        query,
        mask,
        None if rows is None else rows.inv_norm,
        None if rows is None else rows.scale,
        mean,
        reach,
        query.stride(),
        None if mask is None else mask.stride(),
        images,
        q,
        c,
        -1.0 if negate else 1.0,
        BR=4 * QUERY_ROWS if many else QUERY_ROWS,
        BC=QUERY_COLS,
        BO=BLOCK_OUT,
        num_warps=QUERY_WARPS,
        registers=QUERY_REGISTERS,
    )
    return MeanQuery(mean, reach)


def launch_min_max(score: torch.Tensor, reach: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Relevance (rows,) fp32 in [0, 1]."""
    relevance = torch.empty_like(score)
    slots, total = layout.slots(BLOCK_SCORES)
    sizes = (layout.segments, layout.n, slots)
    launch(min_max_kernel, total, score, reach, relevance, *sizes, BLOCK=BLOCK_SCORES, num_warps=SCORE_WARPS)
    return relevance
