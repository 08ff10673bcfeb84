"""The factor C of the greedy steps: how it lies in memory, and the product that a step takes of it.

A step that picks j needs C[:m, j] C[:m, :]: for each column the sum of m products, in the order of the rows, as one
chain of fused multiply-adds, so that its bits do not depend on how columns are spread or rows are fetched. There is
next to no arithmetic in it: what counts is how few instructions and waits a row costs. Hence BV = 4 rows of a column
are neighbours in memory, which one load of a thread fetches; the columns of a program form a panel of their own, so
that the distance from these four rows to the next is a constant of the code (packed segments share one panel, whose
width is not); and BC rows, of C[:, j] even BJ, are asked for before the first is waited for.

Asking a chunk ahead, while another is computed, hides less: a thread has six counters to tell which of its loads have
arrived, and the compiler gives one to old loads and new, so that who waits for the old waits for the new.
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
    b_cj,  # C[:, j] of the rows, [1, BV]
    p_mine,
    o_mine,
    x_mine,
    m_r,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BV: tl.constexpr,
):
    """The sums and C[:, j] C[:, :] of BV neighbouring rows, as one chain; rows out of a mask m_r [1, BV] count as 0."""
    if m_r is None:
        b_c = tl.load(p_mine + o_mine)  # [BN, BV]
        if BX > 0:
            x_c = tl.load(p_mine + x_mine)
    else:
        b_c = tl.load(p_mine + o_mine, mask=tl.broadcast_to(m_r, [BN, BV]), other=0.0)
        if BX > 0:
            x_c = tl.load(p_mine + x_mine, mask=tl.broadcast_to(m_r, [BX, BV]), other=0.0)
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
def left_mask(i_v: tl.constexpr, left, BV: tl.constexpr, BC: tl.constexpr):
    """Of `left` < BC rows, those of the group i_v, if it is whole; after all such groups the rows of the one that is
    not."""
    o_r = tl.arange(0, BV)[None, :]
    m_r = o_r < left % BV
    if (i_v + 1) * BV < BC:
        m_r = 0 * o_r + (i_v + 1) * BV <= left
    return m_r


@triton.jit
def ask(p_j, stride, PAST_L1: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr):
    """C[:BC, j], in groups [1, BV]."""
    o_r = tl.arange(0, BV)[None, :]
    asked = ()
    for i_v in tl.static_range(BC // BV):
        asked += (tl.load(p_j + i_v * stride + o_r, cache_modifier=PAST_L1),)  # type: ignore[assignment]
    return asked


@triton.jit
def ask_left(p_j, left, stride, PAST_L1: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr):
    """C[:left, j], left < BC: groups as `left_mask` has them. What is past `left` is 0, and is not touched: the program
    whose columns these are may be writing it."""
    o_r = tl.arange(0, BV)[None, :]
    asked = ()
    for i_v in tl.static_range(BC // BV):
        p_r = p_j + i_v * stride + o_r
        if (i_v + 1) * BV == BC:
            p_r = p_j + left // BV * stride + o_r
        m_r = left_mask(i_v, left, BV, BC)
        asked += (tl.load(p_r, mask=m_r, other=0.0, cache_modifier=PAST_L1),)  # type: ignore[assignment]
    return asked


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
    BJ: tl.constexpr,
):
    """C[:m, j] C[:m, :] at the columns o_mine [BN] and, where BX is not 0, x_mine [BX]: one chain each in the order of
    the rows; those of BV neighbours are `stride` apart.

    BC rows are fetched at once, without masks; then what is left of whole groups of neighbours, and then of rows. A
    program waits for L2 as often as it asks for C[:, j] past L1: BJ = 2 BC rows of it are asked for at once where there
    are registers for them, and what is left together with the last whole chunk.
    """
    b_sum = tl.zeros([BN], dtype=tl.float32)
    x_sum = b_sum
    if BX > 0:
        x_sum = tl.zeros([BX], dtype=tl.float32)
    for _ in range(0, m // BJ):
        b_j = ask(p_j, stride, PAST_L1, BV, BJ)
        if BJ > BC:
            tl.debug_barrier()  # so that the compiler leaves them in front: sorted by use, the last would come late
        for i_v in tl.static_range(BJ // BV):
            b_sum, x_sum = add_rows(b_sum, x_sum, b_j[i_v], p_mine + i_v * stride, o_mine, x_mine, None, BN, BX, BV)
        p_mine += BJ // BV * stride
        p_j += BJ // BV * stride
    tl.static_assert(BJ == BC or BJ == 2 * BC)
    left = m % BC
    if BJ > BC:
        if m % BJ >= BC:
            b_j = ask(p_j, stride, PAST_L1, BV, BC)
            b_left = ask_left(p_j + BC // BV * stride, left, stride, PAST_L1, BV, BC)
            for i_v in tl.static_range(BC // BV):
                b_sum, x_sum = add_rows(b_sum, x_sum, b_j[i_v], p_mine + i_v * stride, o_mine, x_mine, None, BN, BX, BV)
            p_mine += BC // BV * stride
        else:
            b_left = ask_left(p_j, left, stride, PAST_L1, BV, BC)
    if left > 0:
        if BJ == BC:
            b_left = ask_left(p_j, left, stride, PAST_L1, BV, BC)
        for i_v in tl.static_range(BC // BV):
            at = i_v * stride
            if (i_v + 1) * BV == BC:
                at = left // BV * stride
            m_r = left_mask(i_v, left, BV, BC)
            b_sum, x_sum = add_rows(b_sum, x_sum, b_left[i_v], p_mine + at, o_mine, x_mine, m_r, BN, BX, BV)
    return b_sum, x_sum
