"""The factor C of the greedy steps: how it lies in memory, and the product that a step takes of it.

A step that picks j needs C[:m, j] C[:m, :]: for each column the sum of m products, in the order of the rows, as one
chain of fused multiply-adds, so that its bits do not depend on how columns are spread or rows are fetched. There is
next to no arithmetic in it: what counts is how few instructions and waits a row costs. Hence BV = 4 rows of a column
are neighbours in memory, which one load of a thread fetches; the columns of a program form a panel of their own, so
that the distance from these four rows to the next is a constant of the code (packed segments share one panel, whose
width is not); and BC rows are asked for before the first is waited for.
"""

import triton
import triton.language as tl


@triton.jit
def add_four(b_sum, b_c, b_j0, b_j1, b_j2, b_j3, BN: tl.constexpr):
    """b_sum + four rows b_c [BN, 4], each times its scalar, as one chain."""
    b_even, b_odd = tl.split(tl.reshape(b_c, [BN, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_sum = tl.fma(b_0, tl.broadcast_to(b_j0, [BN]), b_sum)
    b_sum = tl.fma(b_1, tl.broadcast_to(b_j1, [BN]), b_sum)
    b_sum = tl.fma(b_2, tl.broadcast_to(b_j2, [BN]), b_sum)
    return tl.fma(b_3, tl.broadcast_to(b_j3, [BN]), b_sum)


@triton.jit
def add_rows(
    b_sum,  # [BN]
    x_sum,  # [BX], of further columns, where BX is not 0
    p_mine,
    o_mine,
    x_mine,
    p_j,
    m_r,
    PAST_L1: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """The sums and C[:, j] C of BV neighbouring rows, as one chain; rows out of a mask m_r [1, BV] count as 0."""
    p_cj = p_j + tl.arange(0, BV)[None, :]
    if m_r is None:
        b_c = tl.load(p_mine + o_mine)  # [BN, BV]
        if BX > 0:
            x_c = tl.load(p_mine + x_mine)
        b_cj = tl.load(p_cj, cache_modifier=PAST_L1)  # [1, BV]
    else:
        b_c = tl.load(p_mine + o_mine, mask=tl.broadcast_to(m_r, [BN, BV]), other=0.0)
        if BX > 0:
            x_c = tl.load(p_mine + x_mine, mask=tl.broadcast_to(m_r, [BX, BV]), other=0.0)
        b_cj = tl.load(p_cj, mask=m_r, other=0.0, cache_modifier=PAST_L1)
    if BV == 4:
        b_j_even, b_j_odd = tl.split(tl.reshape(b_cj, [1, 2, 2]))
        b_j0, b_j2 = tl.split(b_j_even)
        b_j1, b_j3 = tl.split(b_j_odd)
        b_sum = add_four(b_sum, b_c, b_j0, b_j1, b_j2, b_j3, BN)
        if BX > 0:
            x_sum = add_four(x_sum, x_c, b_j0, b_j1, b_j2, b_j3, BX)
    else:
        tl.static_assert(BX == 0)
        b_sum = tl.fma(tl.reshape(b_c, [BN]), tl.broadcast_to(tl.reshape(b_cj, [1]), [BN]), b_sum)
    return b_sum, x_sum


@triton.jit
def project(
    p_mine,
    o_mine,
    x_mine,
    p_j,
    m,
    stride,
    PAST_L1: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
):
    """C[:m, j] C[:m, :] at the columns o_mine [BN] and, where BX is not 0, x_mine [BX]: one chain each in the order of
    the rows; those of BV neighbours are `stride` apart.

    BC rows are fetched at once, without masks; then what is left of whole groups of neighbours, and then of rows.
    """
    b_sum = tl.zeros([BN], dtype=tl.float32)
    x_sum = b_sum
    if BX > 0:
        x_sum = tl.zeros([BX], dtype=tl.float32)
    for _ in range(0, m // BC):
        for i_v in tl.static_range(BC // BV):
            at = i_v * stride
            b_sum, x_sum = add_rows(b_sum, x_sum, p_mine + at, o_mine, x_mine, p_j + at, None, PAST_L1, BN, BX, BV)
        p_mine += BC // BV * stride
        p_j += BC // BV * stride
    left = m % BC
    if left > 0:
        o_r = tl.arange(0, BV)[None, :]
        for i_v in tl.static_range(BC // BV - 1):
            m_r = 0 * o_r + (i_v + 1) * BV <= left
            at = i_v * stride
            b_sum, x_sum = add_rows(b_sum, x_sum, p_mine + at, o_mine, x_mine, p_j + at, m_r, PAST_L1, BN, BX, BV)
        if BV > 1:
            at = left // BV * stride
            m_r = o_r < left % BV
            b_sum, x_sum = add_rows(b_sum, x_sum, p_mine + at, o_mine, x_mine, p_j + at, m_r, PAST_L1, BN, BX, BV)
    return b_sum, x_sum
