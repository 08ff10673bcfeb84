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
"""

import triton
import triton.language as tl

from .kernel_matrix import finite_relevance
from .tokens import locate, order_key, widen

# In the place of a residual, which is never negative
BAD = tl.constexpr(-1.0)  # a token with NaN or Inf
TAKEN = tl.constexpr(-2.0)  # a token that is picked or does not exist


# Counts that vary from call to call: a new value must not mean a new compilation
UNSPECIALIZED = (
    *("S", "K", "need", "slots", "n_slots", "i_slot0", "n_above", "n_upto"),
    *("round_from", "round_to"),
)


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
def publish(p_slot, best, n_g):
    """Hands the best key of this program to those it shares the image with, and with it all it has written so far."""
    if n_g > 1:
        tl.atomic_xchg(p_slot, tl.maximum(best, 1), sem="release", scope="gpu")


@triton.jit
def best_of_all(p_slots, best, n_g, RESIDENT: tl.constexpr, BG: tl.constexpr):
    """The best key of all programs that share the image, once they have all published theirs."""
    if n_g > 1:
        o_g = tl.arange(0, BG)
        b_keys = tl.load(p_slots + o_g, mask=o_g < n_g, other=1, volatile=True)
        if RESIDENT:
            while tl.min(b_keys, axis=0) == 0:
                b_keys = tl.load(p_slots + o_g, mask=o_g < n_g, other=1, volatile=True)
            tl.debug_barrier()
        best = tl.max(b_keys, axis=0)
    return best


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


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    # The rank of a level is judged by the largest L_ii of it and the levels before it. That is `top`, which the first
    # pick finds, or `top_rest` for what follows a first tier.
    top_rest = tl.full([], 0.0, tl.float32)
    if TIERS:
        for i_n in range(0, n, BN):
            o_a = i_n + tl.arange(0, BN)
            b_diag = initial_residual(p_o, stride_order, p_inv + first, o_a, o_a < n, RELEVANCE)
            top_rest = tl.maximum(top_rest, tl.max(b_diag, axis=0))

    best = tl.max(pick_keys(b_residual, p_tier + first, p_o, stride_order, o_n, m_n, exhausted, TIERS), axis=0)
    i_round = tl.maximum(round_from, 0)
    if GRID:
        publish(p_slots + tl.cast(i_round, tl.int64) * n_slots + i_slot, best, n_g)
    while (i_round < round_to) & (t < k) & (count < need):
        if GRID:
            p_round = p_slots + tl.cast(i_round, tl.int64) * n_slots + (i_slot - i_g)
            best = best_of_all(p_round, best, n_g, RESIDENT, BG)
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
            if ranked & (t < k) & (count < need):
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
            publish(p_slots + tl.cast(i_round, tl.int64) * n_slots + i_slot, best, n_g)

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
