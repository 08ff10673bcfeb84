"""Row statistics of the tokens and the tile product, shared by every kernel that compares tokens.

A cosine needs 1/|x|, and rows of any finite magnitude are allowed: squares of fp32/bf16 values overflow above 1e19 and
vanish below 1e-23. Multiplying a row by a power of two is exact, so a row whose largest magnitude lies outside
[2^-40, 2^40] carries a scale that moves it near 1, and every other row carries exactly 1. Kernels read raw values; a
tile that meets a scale other than 1 takes a second loop that multiplies on load, and the tensor cores still see the
input dtype. The result has the same bits on either loop. fp16 never needs a scale.

The state of a row travels in its inverse norm: `inv_norm > 0` an ordinary row, `0` a zero row, `-1` a row that holds
NaN or Inf. Statistics describe the scaled row, so cos(i, j) = dot(scale_i x_i, scale_j x_j) inv_norm_i inv_norm_j.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

SAFE_EXPONENT = 40
BLOCK_ROWS = 4
BLOCK_COLS = 1024
STATS_WARPS = 4


def device_guard(tensor: torch.Tensor):
    """Make the tensor's device current: Triton launches on the current device. CPU tensors (the interpreter) need none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    """One pass over whole rows: largest magnitude, count of NaN/Inf, sum of squares and dot with `p_other`, scaled."""
    b_max = tl.zeros([BR, BC], dtype=tl.float32)
    b_bad = tl.zeros([BR, BC], dtype=tl.int32)
    b_sq = tl.zeros([BR, BC], dtype=tl.float32)
    b_dot = tl.zeros([BR, BC], dtype=tl.float32)
    for i_d in range(0, D, BC):
        o_d = i_d + tl.arange(0, BC)
        m_d = o_d < D
        p_x = p_rows[:, None] + o_d[None, :].to(tl.int64) * stride_d  # [BR, BC]
        b_x = widen(tl.load(p_x, mask=m_rows[:, None] & m_d[None, :], other=0.0))
        m_finite = tl.abs(b_x) < float("inf")  # false for NaN as well
        b_bad += tl.where(m_finite, 0, 1)
        b_x = tl.where(m_finite, b_x, 0.0)
        b_max = tl.maximum(b_max, tl.abs(b_x))
        b_x = b_x * b_scale[:, None]
        b_sq += b_x * b_x
        if DOT:
            b_q = tl.load(p_other + o_d, mask=m_d, other=0.0)  # [BC]
            b_dot += b_x * b_q[None, :]
    return tl.max(b_max, axis=1), tl.sum(b_bad, axis=1), tl.sum(b_sq, axis=1), tl.sum(b_dot, axis=1)


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
    b_max, b_bad, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, DOT, BR, BC)
    if SCALED:
        # Exponent field of the largest magnitude: 0 for denormals, which 2^126 brings up to 2^-23 at least.
        b_exp = (b_max.to(tl.int32, bitcast=True) >> 23) - 127
        m_far = (b_max > 0.0) & ((b_exp > SAFE) | (b_exp < -SAFE)) & (b_bad == 0)
        if tl.max(m_far.to(tl.int32), axis=0) > 0:
            b_near = tl.minimum(tl.maximum(-b_exp, -126), 126)
            b_scale = tl.where(m_far, ((b_near + 127) << 23).to(tl.float32, bitcast=True), b_scale)
            b_max, b_bad, b_sq, b_dot = row_pass(p_rows, m_rows, b_scale, stride_d, p_other, D, DOT, BR, BC)
    b_inv = tl.where(b_sq > 0.0, 1.0 / tl.sqrt_rn(tl.where(b_sq > 0.0, b_sq, 1.0)), 0.0)
    b_cos = b_dot * b_inv
    b_inv = tl.where(b_bad > 0, -1.0, b_inv)
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
                p_a, m_a, b_scale_a, stride_ad, p_b, m_b, b_scale_b, stride_bd, D, True, BM, BN, BD, PRECISION
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
def token_stats_kernel(
    p_tokens,
    p_inv,
    p_scale,
    stride_b,
    stride_n,
    stride_d,
    N,
    D,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SCALED: tl.constexpr,
    SAFE: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BR + tl.arange(0, BR)
    m_n = o_n < N
    p_rows = p_tokens + i_b * stride_b + o_n.to(tl.int64) * stride_n
    b_inv, b_scale, _ = row_stats(p_rows, m_n, stride_d, p_inv, D, False, BR, BC, SCALED, SAFE)
    tl.store(p_inv + i_b * N + o_n, b_inv, mask=m_n)
    tl.store(p_scale + i_b * N + o_n, b_scale, mask=m_n)


def launch_token_stats(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row statistics of (B, N, D) tokens of any strides, in one launch.

    Returns `inv_norm` (B, N) fp32 (1/|scale * x|; 0 for a zero row, -1 for a row holding NaN or Inf) and `scale`
    (B, N) fp32 (an exact power of two, 1 for almost every row), which `dot_tile` takes.
    """
    batch, n, d = tokens.shape
    inv_norm = torch.empty((batch, n), dtype=torch.float32, device=tokens.device)
    scale = torch.empty_like(inv_norm)
    if batch and n:
        with device_guard(tokens):
            token_stats_kernel[(triton.cdiv(n, BLOCK_ROWS), batch)](
                tokens,
                inv_norm,
                scale,
                *tokens.stride(),
                n,
                d,
                BR=BLOCK_ROWS,
                BC=BLOCK_COLS,
                SCALED=tokens.dtype != torch.float16,
                SAFE=SAFE_EXPONENT,
                num_warps=STATS_WARPS,
            )
    return inv_norm, scale
