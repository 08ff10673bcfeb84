"""What greedy steps are made of: where residuals start, the best token's key and its exchange, rows from tokens."""

import triton
import triton.language as tl

from .layout import order_key
from .pairs import finite_relevance
from .plan import MOST_TOKENS
from .rows import widen

# In the place of a residual, which is never negative
BAD = tl.constexpr(-1.0)  # a token with NaN or Inf
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32
TAKEN = tl.constexpr(-2.0)  # a token that is picked or does not exist


@triton.jit
def order_of(p_order, p_k, stride_diagonal, first, o_n, m_n):
    """What ranks tokens where no variance is left: their relevance, or the diagonal of L."""
    if p_order is not None:
        b_order = tl.load(p_order + first + o_n, mask=m_n, other=0.0)
    else:
        b_order = tl.load(p_k + o_n.to(tl.int64) * stride_diagonal, mask=m_n, other=0.0)
    return b_order


@triton.jit
def initial_residual(p_start, p_order, p_inv, p_k, stride_diagonal, first, o_n, m_n):
    """L_ii of the columns, or what is given to start from; BAD for tokens with NaN or Inf, TAKEN past the end."""
    if p_start is not None:
        b_residual = tl.load(p_start + first + o_n, mask=m_n, other=0.0)
        m_good = tl.abs(b_residual) < float("inf")
    elif p_order is not None:
        b_order = order_of(p_order, p_k, stride_diagonal, first, o_n, m_n)
        b_inv = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
        m_good = (tl.abs(b_order * b_order) < float("inf")) & (b_inv >= 0.0)
        b_residual = tl.where(b_inv > 0.0, b_order * b_order, 0.0)
    else:
        b_order = order_of(p_order, p_k, stride_diagonal, first, o_n, m_n)
        m_good = tl.abs(b_order) < float("inf")
        b_residual = tl.where(b_order > 0.0, b_order, 0.0)
    return tl.where(m_n, tl.where(m_good, b_residual, BAD), TAKEN)


@triton.jit
def block(at, BN: tl.constexpr):
    """`at` and the next, loaded one by one: all arrays of a block have C's layout, none is carried to another's."""
    return tl.max_contiguous(at + tl.arange(0, BN), 1)


@triton.jit
def flags_of(p_flag, first, o_n, m_n):
    """1 where the byte of a token is not 0; 0 for all without flags."""
    b_flag = o_n * 0
    if p_flag is not None:
        b_flag = (tl.load(p_flag + first + o_n, mask=m_n, other=0) != 0).to(tl.int32)
    return b_flag


@triton.jit
def best_key(b_residual, b_tier, b_stop, p_order, p_k, stride_diagonal, first, o_n, m_n, exhausted):
    """The largest of the int64 keys of the columns; a key is 0 where a token is not free."""
    b_level = tl.where(b_residual >= 0.0, 2 + b_tier, tl.where(b_residual == BAD, 1, 0))
    b_value = tl.where(b_residual >= 0.0, b_residual, 0.0).to(tl.int32, bitcast=True)
    if exhausted > 1:
        b_order = order_key(order_of(p_order, p_k, stride_diagonal, first, o_n, m_n))
        b_value = tl.where(b_level == exhausted, b_order, b_value)
    b_index = ((MOST_TOKENS - 1 - o_n) << 1) | b_stop
    b_key = (b_level.to(tl.int64) << 61) | ((b_value.to(tl.int64) + 0x80000000) << 29) | b_index.to(tl.int64)
    return tl.max(tl.where(b_level > 0, b_key, 0), axis=0)


@triton.jit
def publish(p_slots, i_round, n_slots, i_slot, best, n_g):
    """Hands the best key of this program to those it shares the image with, and with it all it has written so far."""
    if n_g > 1:
        p_slot = p_slots + tl.cast(i_round, tl.int64) * n_slots + i_slot
        tl.atomic_xchg(p_slot, tl.maximum(best, 1), sem="release", scope="gpu")


@triton.jit
def best_of_all(p_slots, i_round, n_slots, i_slot, best, n_g, p_progress, BG: tl.constexpr):
    """The best key of all programs that share the image (from slot i_slot on), once they have all published theirs."""
    if n_g > 1:
        p_round = p_slots + tl.cast(i_round, tl.int64) * n_slots + i_slot
        o_g = tl.arange(0, BG)
        b_keys = tl.load(p_round + o_g, mask=o_g < n_g, other=1, volatile=True)
        if p_progress is None:
            while tl.min(b_keys, axis=0) == 0:
                b_keys = tl.load(p_round + o_g, mask=o_g < n_g, other=1, volatile=True)
            tl.debug_barrier()
        best = tl.max(b_keys, axis=0)
    return best


@triton.jit
def reported(gain, level, t, p_unit, i_s):
    """What the caller gets as the gain of pick t, whose residual was `gain`: see `p_unit` of the kernel."""
    if p_unit is not None:
        if p_unit.dtype.element_ty == tl.float64:
            p_image = p_unit + 3 * i_s
            wide = tl.where(gain > 0.0, gain.to(tl.float64) * tl.load(p_image), 0.0)
            wide += tl.load(p_image + tl.where(t == 0, 1, 2))
            wide = tl.minimum(tl.maximum(wide, -LARGEST), LARGEST)
            gain = tl.where(level > 1, wide, 0.0).to(tl.float32)
        else:
            unit = tl.load(p_unit + i_s)
            gain = gain * unit * unit
    return gain


@triton.jit
def level_cosine(b_cos, b_own, own_j):
    """Cosines, or their multiples, by norms from the same products: of two equal tokens it is exactly 1.

    Their cosine has then the same bits c as that of each with itself, and in IEEE arithmetic c / sqrt(c c) is 1. What
    is left of the variance of a token equal to a pick is the rounding of about 15 operations, 15 * 2^-24, below
    RANK_TOLERANCE whatever D.
    """
    b_square = b_own * own_j
    return tl.div_rn(b_cos, tl.sqrt_rn(tl.where(b_square > 0.0, b_square, 1.0)))


@triton.jit
def residual_after(
    b_residual,
    b_row,  # L[j, :]
    b_own,
    b_sum,  # C[:m, j] C[:m, :]
    p_new,  # C[m, :] of this program
    o_n,
    at,
    first,
    m_n,
    own_j,
    gain,
    m,
    p_kernel,
    p_own,
    p_factor,
    p_offset,
    p_slope,
    BV: tl.constexpr,
):
    """Residuals of the columns once j is picked, whose own was `gain`; C[m, :] is written, if there is a C."""
    if p_kernel is not None:
        b_row = tl.where(tl.abs(b_row) < float("inf"), b_row, 0.0)
        if p_own is not None:
            b_row = level_cosine(b_row, b_own, own_j)
    if p_factor is not None:
        b_new = (b_row - b_sum) * tl.div_rn(1.0, tl.sqrt_rn(gain))
        b_less = tl.fma(-b_new, b_new, b_residual)
        tl.store(p_new + BV * (o_n - at), b_new, mask=m_n)
    else:
        b_slope = tl.load(p_slope + first + o_n, mask=m_n, other=0.0)
        b_less = tl.fma(-b_slope, b_row, tl.load(p_offset + first + o_n, mask=m_n, other=0.0))
        b_less = tl.where((m > 0) & (b_residual < b_less), b_residual, b_less)
    b_less = tl.where(b_less > 0.0, b_less, 0.0)  # NaN counts as 0
    return tl.where(b_residual >= 0.0, b_less, b_residual)


@triton.jit
def feature_row(
    p_x,  # first token of the image
    p_relevance,
    p_inv,
    p_scale,
    p_own,
    p_row,  # fp32, written at this program's columns
    first,
    j,  # a token, or None: every token with itself, to p_own
    i_from,  # first column of this program
    n,
    strides,
    D,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """L[j, :] from the tokens, at the columns of this program; a token with residual left is no zero row."""
    for i_r in range(i_from, tl.minimum(i_from + BN, n), BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < n
        b_scale = tl.load(p_scale + first + o_r, mask=m_r, other=1.0)
        b_inv = tl.load(p_inv + first + o_r, mask=m_r, other=0.0)
        p_r = p_x + o_r.to(tl.int64) * strides[1]
        b_dot = tl.zeros([BR, BD], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = (i_d + tl.arange(0, BD)).to(tl.int64)
            m_d = o_d < D
            b_x = tl.load(p_r[:, None] + o_d[None, :] * strides[2], mask=m_r[:, None] & m_d[None, :], other=0.0)
            b_x = widen(b_x) * b_scale[:, None]
            b_y = b_x
            if j is not None:
                p_xj = p_x + j.to(tl.int64) * strides[1] + o_d * strides[2]
                b_y = (widen(tl.load(p_xj, mask=m_d, other=0.0)) * tl.load(p_scale + first + j))[None, :]
            b_dot += b_x * b_y  # [BR, BD]
        if j is not None:
            b_r = finite_relevance(tl.load(p_relevance + first + o_r, mask=m_r, other=0.0))
            b_r *= finite_relevance(tl.load(p_relevance + first + j))
            b_own = tl.load(p_own + first + o_r, mask=m_r, other=1.0)
            b_cos = tl.sum(b_dot, axis=1) * (b_inv * tl.load(p_inv + first + j))
            b_cos = level_cosine(b_cos, b_own, tl.load(p_own + first + j, cache_modifier=".cg"))
            tl.store(p_row + first + o_r, tl.where(b_inv > 0.0, b_cos * b_r, 0.0), mask=m_r)
        else:
            tl.store(p_own + first + o_r, tl.sum(b_dot, axis=1) * (b_inv * b_inv), mask=m_r)
