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
def add_rows(b_sum, p_mine, p_j, m_r, PAST_L1: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr):
    """b_sum + C[:, j] C of BV neighbouring rows, as one chain; rows out of the mask m_r [1, BV], if any, count as 0."""
    p_cj = p_j + tl.arange(0, BV)[None, :]
    if m_r is None:
        b_c = tl.load(p_mine)  # [BN, BV]
        b_cj = tl.load(p_cj, cache_modifier=PAST_L1)  # [1, BV]
    else:
        b_c = tl.load(p_mine, mask=tl.broadcast_to(m_r, [BN, BV]), other=0.0)
        b_cj = tl.load(p_cj, mask=m_r, other=0.0, cache_modifier=PAST_L1)
    if BV == 4:
        b_even, b_odd = tl.split(tl.reshape(b_c, [BN, 2, 2]))
        b_j_even, b_j_odd = tl.split(tl.reshape(b_cj, [1, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        b_j0, b_j2 = tl.split(b_j_even)
        b_j1, b_j3 = tl.split(b_j_odd)
        b_sum = tl.fma(b_0, tl.broadcast_to(b_j0, [BN]), b_sum)
        b_sum = tl.fma(b_1, tl.broadcast_to(b_j1, [BN]), b_sum)
        b_sum = tl.fma(b_2, tl.broadcast_to(b_j2, [BN]), b_sum)
        b_sum = tl.fma(b_3, tl.broadcast_to(b_j3, [BN]), b_sum)
    else:
        b_sum = tl.fma(tl.reshape(b_c, [BN]), tl.broadcast_to(tl.reshape(b_cj, [1]), [BN]), b_sum)
    return b_sum


@triton.jit
def project(
    p_mine, o_mine, p_j, m, stride, PAST_L1: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr
):
    """C[:m, j] C[:m, :], as one chain in the order of the rows; those of BV neighbours are `stride` apart.

    BC rows are fetched at once, without masks; then what is left of whole groups of neighbours, and then of rows.
    """
    b_sum = tl.zeros([BN], dtype=tl.float32)
    for _ in range(0, m // BC):
        for i_v in tl.static_range(BC // BV):
            b_sum = add_rows(b_sum, p_mine + i_v * stride + o_mine, p_j + i_v * stride, None, PAST_L1, BN, BV)
        p_mine += BC // BV * stride
        p_j += BC // BV * stride
    left = m % BC
    if left > 0:
        o_r = tl.arange(0, BV)[None, :]
        for i_v in tl.static_range(BC // BV - 1):
            m_r = 0 * o_r + (i_v + 1) * BV <= left
            b_sum = add_rows(b_sum, p_mine + i_v * stride + o_mine, p_j + i_v * stride, m_r, PAST_L1, BN, BV)
        if BV > 1:
            o_v = left // BV * stride
            b_sum = add_rows(b_sum, p_mine + o_v + o_mine, p_j + o_v, o_r < left % BV, PAST_L1, BN, BV)
    return b_sum
