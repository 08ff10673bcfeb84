"""Segments, row statistics of the tokens and the tile product, shared by every kernel that compares tokens.

A cosine needs 1/|x|, and rows of any finite magnitude are allowed: squares of fp32/bf16 values overflow above 1e19 and
vanish below 1e-23. Multiplying a row by a power of two is exact, so a row whose largest magnitude lies outside
[2^-40, 2^40] carries a scale that moves it near 1, and every other row carries exactly 1. Kernels read raw values; a
tile that meets a scale other than 1 takes a second loop that multiplies on load, and the tensor cores still see the
input dtype. The result has the same bits on either loop. fp16 never needs a scale.

The state of a row travels in its inverse norm: `inv_norm > 0` an ordinary row, `0` a zero row, `-1` a row that holds
NaN or Inf. Statistics describe the scaled row, so cos(i, j) = dot(scale_i x_i, scale_j x_j) inv_norm_i inv_norm_j.

Dense images and packed segments run through the same kernels. A program owns one tile of rows of one image, and `slot`
numbers the tiles of all images. Packed segments have lengths that only the device knows, while a grid has to be static:
segment s owns the slots from cu[s] // BLOCK + s on, which is at least cdiv(length, BLOCK) of them and T // BLOCK + S
altogether; a program whose slot lies behind the end of its segment returns at once. Per-row arrays are flat: entry
`first + row`, with `first` = image * N or cu[s].
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

SAFE_EXPONENT = 40
BLOCK_ROWS = 4
BLOCK_COLS = 512
STATS_WARPS = 4
STATS_REGISTERS = 128
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, which is where Triton launches. CPU tensors (the interpreter) need none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def saturate(x: float) -> float:
    """A parameter within fp32, which is what kernels take: as an infinity it would make NaN of a product with 0."""
    largest = torch.finfo(torch.float32).max
    return min(max(x, -largest), largest)


def register_limit(device: torch.device, registers: int) -> dict[str, Any]:
    """A launch option. Without it ptxas aims at occupancy, and may spill a little to save a few registers."""
    return {} if device.type == "cpu" or torch.version.hip is not None else {"maxnreg": registers}


@triton.jit
def locate(
    p_cu,  # (S + 1,) int32, read when VARLEN
    i_slot,
    S,
    N,  # tokens per image; of all segments when VARLEN
    slots,  # per image; unused when VARLEN
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Image or segment of a slot, the tile's number in it, its first flat row (int64) and its length."""
    if VARLEN:
        i_s = -1
        for i_c in range(0, S, 1024):
            o_s = i_c + tl.arange(0, 1024)
            b_cu = tl.load(p_cu + o_s, mask=o_s < S, other=0)
            i_s += tl.sum(((o_s < S) & (b_cu // BLOCK + o_s <= i_slot)).to(tl.int32), axis=0)
        i_s = tl.maximum(i_s, 0)
        first, n = segment(p_cu, i_s, N, VARLEN)
        i_tile = i_slot - (first.to(tl.int32) // BLOCK + i_s)
    else:
        i_s = i_slot // slots
        i_tile = i_slot - i_s * slots
        first, n = segment(p_cu, i_s, N, VARLEN)
    return i_s, i_tile, first, n


@triton.jit
def segment(p_cu, i_s, N, VARLEN: tl.constexpr):
    """First flat row (int64) and length of a segment. Bounds are clamped: they cannot be checked without a sync."""
    if VARLEN:
        first = tl.minimum(tl.maximum(tl.load(p_cu + i_s), 0), N)
        n = tl.minimum(tl.maximum(tl.load(p_cu + i_s + 1), first), N) - first
    else:
        first = i_s.to(tl.int64) * N
        n = i_s * 0 + N  # a tensor, also where N = 1 was specialised to a constant
    return first.to(tl.int64), n


def slot_count(segments: int, n: int, block: int, varlen: bool) -> tuple[int, int]:
    """Slots per image and in all; n is the length of an image, or of all packed segments together."""
    if varlen:
        total = n // block + segments
        return total, total
    per_image = triton.cdiv(n, block)
    return per_image, per_image * segments


@triton.jit
def order_key(b_x):
    """int32 keys that order as the floats do, -0 and +0 alike."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(b_key):
    """Inverse of `order_key`."""
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def widen(b_x):
    """fp32 values of a tile, exact for denormals too: bf16 is the upper half of an fp32 word."""
    if b_x.dtype == tl.bfloat16:
        b_wide = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        b_wide = b_x.to(tl.float32)
    return b_wide


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
def row_pass(
    p_rows,  # [BR] pointers to the first element of each row
    m_rows,  # [BR]
    b_scale,  # [BR]
    stride_d,
    p_other,  # pointer to a contiguous fp32 vector, read when DOT
    D,
    DOT: tl.constexpr,
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
        if DOT:
            b_q = tl.load(p_other + o_d, mask=m_d, other=0.0)  # [BC]
            b_dot += b_x * b_q[None, :]
    return tl.max(b_max, axis=1), tl.sum(b_sq, axis=1), tl.sum(b_dot, axis=1)


@triton.jit
def row_stats(
    p_rows,
    m_rows,
    stride_d,
    p_other,
    D,
    DOT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SCALED: tl.constexpr,
    SAFE: tl.constexpr,
):
    """Inverse norm (with the row's state in it), power-of-two scale and cosine-to-be `dot * inv_norm` of each row."""
    b_scale = tl.full([BR], 1.0, dtype=tl.float32)
    b_max, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, DOT, BR, BC)
    if SCALED:
        # Exponent field of the largest magnitude: 0 for denormals, which 2^126 brings up to 2^-23 at least.
        b_exp = (b_max.to(tl.int32, bitcast=True) >> 23) - 127
        m_far = (b_max > 0.0) & (b_max < float("inf")) & ((b_exp > SAFE) | (b_exp < -SAFE))
        if tl.max(m_far.to(tl.int32), axis=0) > 0:
            b_near = tl.minimum(tl.maximum(-b_exp, -126), 126)
            b_scale = tl.where(m_far, ((b_near + 127) << 23).to(tl.float32, bitcast=True), b_scale)
            _, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, DOT, BR, BC)
    b_inv = tl.where(b_sq > 0.0, tl.rsqrt(tl.where(b_sq > 0.0, b_sq, 1.0)), 0.0)
    b_cos = b_dot * b_inv
    b_inv = tl.where(b_max < float("inf"), b_inv, -1.0)
    return b_inv, b_scale, b_cos


@triton.jit
def dot_pass(
    p_a,
    m_a,
    b_scale_a,
    stride_ad,
    p_b,
    m_b,
    b_scale_b,
    stride_bd,
    D,
    RESCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        o_wide = o_d.to(tl.int64)
        p_at = p_a[:, None] + o_wide[None, :] * stride_ad  # [BM, BD]
        p_bt = p_b[None, :] + o_wide[:, None] * stride_bd  # [BD, BN]
        b_a = tl.load(p_at, mask=m_a[:, None] & m_d[None, :], other=0.0)
        b_b = tl.load(p_bt, mask=m_b[None, :] & m_d[:, None], other=0.0)
        if RESCALE:
            b_a = rescale(b_a, b_scale_a[:, None])
            b_b = rescale(b_b, b_scale_b[None, :])
        if INTERPRETED:  # the interpreter multiplies the bit patterns of bf16; products of widened values are the same
            b_a = widen(b_a)
            b_b = widen(b_b)
        b_acc = tl.dot(b_a, b_b, acc=b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def dot_tile(
    p_a,  # [BM] pointers to the first element of each row
    m_a,  # [BM]
    b_scale_a,  # [BM] fp32, from the row statistics
    stride_ad,
    p_b,  # [BN]
    m_b,  # [BN]
    b_scale_b,  # [BN]
    stride_bd,
    D,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dot(scale_i a_i, scale_j b_j) as a [BM, BN] fp32 tile, accumulated from the raw input dtype."""
    if SCALED:
        m_far_a = m_a & (b_scale_a != 1.0)
        m_far_b = m_b & (b_scale_b != 1.0)
        if tl.max(m_far_a.to(tl.int32), axis=0) + tl.max(m_far_b.to(tl.int32), axis=0) > 0:
            b_acc = dot_pass(
                p_a, m_a, b_scale_a, stride_ad, p_b, m_b, b_scale_b, stride_bd, D, True, BM, BN, 16, PRECISION
            )
        else:
            b_acc = dot_pass(
                p_a, m_a, b_scale_a, stride_ad, p_b, m_b, b_scale_b, stride_bd, D, False, BM, BN, BD, PRECISION
            )
    else:
        b_acc = dot_pass(
            p_a, m_a, b_scale_a, stride_ad, p_b, m_b, b_scale_b, stride_bd, D, False, BM, BN, BD, PRECISION
        )
    return b_acc


@triton.jit
def cosine_tile(b_dot, b_inv_a, b_inv_b):
    """Cosines from a raw product: 0 wherever a zero row or a row with NaN/Inf takes part. [BM, BN]"""
    m_rows = (b_inv_a > 0.0)[:, None] & (b_inv_b > 0.0)[None, :]
    return tl.where(m_rows, b_dot * (b_inv_a[:, None] * b_inv_b[None, :]), 0.0)


@triton.jit
def token_kernel(
    p_tokens,
    p_aligned,  # read when ALIGNED
    p_query,  # (images or 1, C) fp32 contiguous, read when QUERY
    p_cu,
    p_inv,
    p_scale,
    p_score,  # written when SCORE
    p_range,  # (images, 2) int32 order keys of the lowest and highest score, updated when QUERY
    p_sums,  # (PLANES, rows) int64, cleared when PLANES
    stride_b,
    stride_n,
    stride_d,
    stride_ab,
    stride_an,
    stride_ad,
    stride_q,
    S,
    N,
    D,
    C,
    slots,
    rows,
    BEST: tl.constexpr,
    PLANES: tl.constexpr,
    QUERY: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VARLEN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SCALED: tl.constexpr,
    SAFE: tl.constexpr,
):
    """One pass over the tokens (and aligned rows): norms, scales, raw relevance and its range, cleared sums.

    The score of a row is its cosine with the image's mean query vector, 0 without a query, +inf for a bad row.
    """
    i_s, i_tile, first, n = locate(p_cu, tl.program_id(0), S, N, slots, BR, VARLEN)
    if i_tile * BR >= n:
        return
    o_n = i_tile * BR + tl.arange(0, BR)
    m_n = o_n < n
    o_flat = first + o_n
    if VARLEN:
        o_row = o_flat
        i_image = 0
    else:
        o_row = o_n.to(tl.int64)
        i_image = i_s.to(tl.int64)
    p_rows = p_tokens + i_image * stride_b + o_row * stride_n
    p_vector = p_query + i_s.to(tl.int64) * stride_q
    b_inv, b_scale, b_score = row_stats(p_rows, m_n, stride_d, p_vector, D, QUERY and not ALIGNED, BR, BC, SCALED, SAFE)
    tl.store(p_inv + o_flat, b_inv, mask=m_n)
    tl.store(p_scale + o_flat, b_scale, mask=m_n)
    if SCORE:
        m_bad = b_inv < 0.0
        if ALIGNED:
            p_rows = p_aligned + i_image * stride_ab + o_row * stride_an
            b_inv, b_scale, b_score = row_stats(p_rows, m_n, stride_ad, p_vector, C, True, BR, BC, SCALED, SAFE)
            # The range is that of the aligned rows; a token that is bad in itself still has a score there.
            m_ranged = b_inv >= 0.0
            m_bad = m_bad | (b_inv < 0.0)
        else:
            m_ranged = b_inv >= 0.0
        tl.store(p_score + o_flat, tl.where(m_bad, float("inf"), b_score), mask=m_n)
        if QUERY:
            b_key = order_key(b_score)
            m_ranged = m_ranged & m_n
            low = tl.min(tl.where(m_ranged, b_key, 0x7FFFFFFF), axis=0)
            high = tl.max(tl.where(m_ranged, b_key, -0x7FFFFFFF), axis=0)
            tl.atomic_min(p_range + 2 * i_s, low, sem="relaxed")
            tl.atomic_max(p_range + 2 * i_s + 1, high, sem="relaxed")
    if PLANES > 0:
        for i_plane in tl.static_range(PLANES):
            b_clear = tl.zeros([BR], dtype=tl.int64)
            if BEST and i_plane == PLANES - 1:
                b_clear += -0x7FFFFFFFFFFFFFFF
            tl.store(p_sums + tl.full([], i_plane, tl.int64) * rows + o_flat, b_clear, mask=m_n)


def dense_layout(tokens: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int, list[int]]:
    """Images or segments, N of the kernels, and strides (image, row, column) of (B, N, D) or packed (T, D) tokens."""
    if cu_seqlens is None:
        return tokens.shape[0], tokens.shape[1], list(tokens.stride())
    return cu_seqlens.shape[0] - 1, tokens.shape[0], [0, *tokens.stride()]


def launch_token_pass(
    tokens: torch.Tensor,
    aligned: torch.Tensor | None = None,
    mean_query: torch.Tensor | None = None,
    score_range: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    score: bool = False,
    planes: int = 0,
    best: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch over (B, N, D) or packed (T, D) tokens; `aligned` is read for the relevance in their place.

    Returns, with rows = B * N or T, inv_norm and scale (rows,), score (rows,), empty unless asked for, and the cleared
    integer sums (planes, rows). `mean_query` (B or 1, C) and `score_range` (B, 2) come from `launch_mean_query`.
    """
    segments, n, strides = dense_layout(tokens, cu_seqlens)
    varlen = cu_seqlens is not None
    rows = n if varlen else segments * n
    device = tokens.device
    inv_norm = torch.empty(rows, dtype=torch.float32, device=device)
    scale = torch.empty_like(inv_norm)
    scores = torch.empty(rows if score else 0, dtype=torch.float32, device=device)
    sums = torch.empty((planes, rows), dtype=torch.int64, device=device)
    if rows:
        slots, total = slot_count(segments, n, BLOCK_ROWS, varlen)
        aligned_strides = dense_layout(aligned, cu_seqlens)[2] if aligned is not None else [0, 0, 0]
        with device_guard(tokens):
            token_kernel[(total,)](
                tokens,
                tokens if aligned is None else aligned,
                inv_norm if mean_query is None else mean_query,
                inv_norm if cu_seqlens is None else cu_seqlens,
                inv_norm,
                scale,
                scores if score else inv_norm,
                inv_norm if score_range is None else score_range,
                sums if planes else inv_norm,
                *strides,
                *aligned_strides,
                mean_query.stride(0) if mean_query is not None and mean_query.shape[0] > 1 else 0,
                segments,
                n,
                tokens.shape[-1],
                tokens.shape[-1] if aligned is None else aligned.shape[-1],
                slots,
                rows,
                BEST=best,
                PLANES=planes,
                QUERY=mean_query is not None,
                SCORE=score,
                ALIGNED=aligned is not None,
                VARLEN=varlen,
                BR=BLOCK_ROWS,
                BC=BLOCK_COLS,
                SCALED=tokens.dtype != torch.float16,
                SAFE=SAFE_EXPONENT,
                num_warps=STATS_WARPS,
                **register_limit(device, STATS_REGISTERS),
            )
    return inv_norm, scale, scores, sums


def launch_token_stats(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row statistics of (B, N, D) tokens of any strides, in one launch.

    Returns `inv_norm` (B, N) fp32 (1/|scale * x|; 0 for a zero row, -1 for a row holding NaN or Inf) and `scale`
    (B, N) fp32 (an exact power of two, 1 for almost every row), which `dot_tile` takes.
    """
    inv_norm, scale, _, _ = launch_token_pass(tokens)
    return inv_norm.view(tokens.shape[:2]), scale.view(tokens.shape[:2])
