"""Each token's largest cosine: with the vectors of a query, or with the other tokens of its image."""

from typing import Any

import torch
import triton
import triton.language as tl

from .layout import Layout, image_of, launch, locate, order_key
from .pairs import CHUNK, PAIR_REGISTERS, PAIR_TILES, TF32, cosine_tile, dot_tile
from .rows import Rows, launch_mean_query, launch_rows
from .steps import level_cosine

BLOCK_OTHERS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
NONE = tl.constexpr(-2.0)  # below any cosine


@triton.jit(do_not_specialize=["row16", "S", "N", "M", "slots"])
def largest_kernel(
    p_x,
    p_inv,  # fp32, one per token: row statistics
    p_scale,
    p_y,  # (S or 1, M, D) vectors, or None: the tokens of the image but the one itself
    p_inv_y,
    p_scale_y,
    p_counts,  # uint8, not 0 where a vector counts, or None
    p_weight,  # fp32, one per token, NaN where it does not count; without vectors
    p_kernel,  # fp32 S in rows of 16 * row16, or None: products are taken here
    p_own,  # fp32, one per token: cosine with itself as in S
    p_out,  # fp32, one per token; with vectors the scores, +inf where a token is bad in itself; else p_weight times the
    # distance
    p_range,  # int32 (S, 2), or None: order keys of the lowest and highest score
    p_cu,
    strides,
    strides_y,
    strides_c,
    row16,
    S,
    N,
    M,
    D,
    slots,
    sign,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TF32: tl.constexpr,
):
    """One tile of tokens against everything they are compared with."""
    i_s, i_m, first, n = locate(p_cu, tl.program_id(0), S, N, slots, BM)
    if i_m * BM >= n:
        return
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < n
    b_inv_m = tl.load(p_inv + first + o_m, mask=m_m, other=0.0)
    b_scale_m = tl.load(p_scale + first + o_m, mask=m_m, other=1.0)
    p_image = image_of(p_x, p_cu, i_s, first, strides)
    p_m = p_image + o_m.to(tl.int64) * strides[1]
    i_image = i_s.to(tl.int64)
    b_top = tl.full([BM], NONE, dtype=tl.float32)
    count = n
    if p_y is not None:
        count = M
    for i_n in range(0, count, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < count
        m_pair = m_m[:, None] & m_n[None, :]
        if p_kernel is not None:
            p_s = p_kernel + (first + o_m)[:, None] * (row16 * 16) + o_n[None, :]
            b_own_m = tl.load(p_own + first + o_m, mask=m_m, other=1.0)
            b_own_n = tl.load(p_own + first + o_n, mask=m_n, other=1.0)
            b_cos = level_cosine(tl.load(p_s, mask=m_pair, other=0.0), b_own_m[:, None], b_own_n[None, :])
        else:
            if p_y is not None:
                i_vector = i_image * (strides_y[0] // strides_y[1]) + o_n
                p_n = p_y + i_image * strides_y[0] + o_n.to(tl.int64) * strides_y[1]
                b_inv_n = tl.load(p_inv_y + i_vector, mask=m_n, other=0.0)
                b_scale_n = tl.load(p_scale_y + i_vector, mask=m_n, other=1.0)
            else:
                p_n = p_image + o_n.to(tl.int64) * strides[1]
                b_inv_n = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
                b_scale_n = tl.load(p_scale + first + o_n, mask=m_n, other=1.0)
            b_dot = tl.zeros([BM, BN], dtype=tl.float32)
            for i_d in range(0, D, CHUNK):
                d = tl.minimum(D - i_d, CHUNK)
                b_dot += dot_tile(p_m + i_d, m_m, b_scale_m, p_n + i_d, m_n, b_scale_n, strides[2], d, BM, BN, BD, TF32)
            b_cos = cosine_tile(b_dot, b_inv_m, b_inv_n)
        if p_y is None:
            b_weight = tl.load(p_weight + first + o_n, mask=m_n, other=float("nan"))
            m_pair = m_pair & (o_m[:, None] != o_n[None, :]) & (tl.abs(b_weight) < float("inf"))[None, :]
        elif p_counts is not None:
            p_flag = p_counts + i_image * strides_c[0] + o_n * strides_c[1]
            m_pair = m_pair & (tl.load(p_flag, mask=m_n, other=0) != 0)[None, :]
        b_top = tl.maximum(b_top, tl.max(tl.where(m_pair, b_cos, NONE), axis=1))

    if p_y is None:
        b_near = tl.maximum(b_top, -1.0)  # also without any other
        b_weight = tl.load(p_weight + first + o_m, mask=m_m, other=0.0)
        tl.store(p_out + first + o_m, b_weight * tl.maximum(1.0 - b_near, 0.0), mask=m_m)
    else:
        b_score = tl.where(b_top == NONE, 0.0, b_top) * sign
        m_ranged = m_m & (b_inv_m >= 0.0)
        m_good = m_ranged & (tl.load(p_out + first + o_m, mask=m_m, other=0.0) < float("inf"))
        tl.store(p_out + first + o_m, tl.where(m_good, b_score, float("inf")), mask=m_m)
        b_key = order_key(b_score)
        low = tl.min(tl.where(m_ranged, b_key, 0x7FFFFFFF), axis=0)
        high = tl.max(tl.where(m_ranged, b_key, -0x7FFFFFFF), axis=0)
        tl.atomic_min(p_range + 2 * i_s, low, sem="relaxed")
        tl.atomic_max(p_range + 2 * i_s + 1, high, sem="relaxed")


def run(
    tokens: torch.Tensor, layout: Layout, *arguments: Any, others: int = 0, row16: int = 0, sign: float = 1.0
) -> None:
    """Launches the kernel on tokens whose last stride is 1; `arguments` are those from `p_inv` to `strides_c`."""
    tile = PAIR_TILES[tokens.dtype]
    slots, total = layout.slots(tile["BT"])
    *pointers, strides_y, strides_c = arguments
    launch(
        largest_kernel,
        total,
        tokens,
        *pointers,
        layout.cu_seqlens,
        layout.strides(tokens),
        strides_y,
        strides_c,
        row16,
        layout.segments,
        layout.n,
        others,
        tokens.shape[-1],
        slots,
        sign,
        BM=tile["BT"],
        BN=BLOCK_OTHERS[tokens.dtype],
        BD=tile["BD"],
        TF32=TF32,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        registers=PAIR_REGISTERS,
    )


def beside(x: torch.Tensor) -> torch.Tensor:
    """The same values, those of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_query_scores(
    space: torch.Tensor,
    layout: Layout,
    rows: Rows,
    query: torch.Tensor,
    query_mask: torch.Tensor | None,
    negate: bool,
    score: torch.Tensor,
    reach: torch.Tensor,
) -> None:
    """Writes each row's largest cosine with the query (B or 1, Q, C) to `score`, and their range to `reach`.

    rows: statistics of `space`. score: +inf where a token is bad in itself. The reach is that of `MeanQuery`, reset.
    """
    query = query.contiguous()
    batch, vectors, width = query.shape
    of_query = launch_rows(query, Layout.of(query))
    mask, strides_m = None, (0, 0)
    if query_mask is not None:
        mask = query_mask.view(torch.uint8)
        strides_m = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1))
    strides_q = (vectors * width if batch > 1 else 0, width, 1)
    found = (rows.inv_norm, rows.scale, query, of_query.inv_norm, of_query.scale, mask, *[None] * 3, score, reach)
    run(beside(space), layout, *found, strides_q, strides_m, others=vectors, sign=-1.0 if negate else 1.0)


def launch_score(
    tokens: torch.Tensor,
    layout: Layout,
    query: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    negate: bool,
    reduce: str,
    aligned: torch.Tensor | None = None,
    *,
    planes: int = 0,
) -> tuple[Rows, torch.Tensor | None]:
    """Rows of the tokens with the mean or largest cosine as their score, and the reach of the scores.

    Mean: two launches. Largest: three, with `aligned` four. Without a query one, and no reach.
    """
    if query is None:
        return launch_rows(tokens, layout, score=True, planes=planes), None
    if reduce == "mean":
        mean = launch_mean_query(query, query_mask, negate, layout.segments)
        return launch_rows(tokens, layout, mean, aligned, score=True, planes=planes), mean.reach
    reach = torch.empty((layout.segments, 2), dtype=torch.int32, device=tokens.device)
    rows = launch_rows(tokens, layout, score=True, planes=planes, reach=reach)
    assert rows.score is not None
    space, of_space = (tokens, rows) if aligned is None else (aligned, launch_rows(aligned, layout))
    launch_query_scores(space, layout, of_space, query, query_mask, negate, rows.score, reach)
    return rows, reach


def launch_alone(
    tokens: torch.Tensor,
    layout: Layout,
    rows: Rows,
    weight: torch.Tensor,
    kernel: torch.Tensor | None,
    own: torch.Tensor | None,
) -> torch.Tensor:
    """Each token's weight times its distance to the nearest other one of its image, 2 without any; (rows,) fp32.

    weight: (rows,) fp32, NaN where a token takes no part. kernel, own: S as `launch_pairs` leaves it; without
    it products are taken anew.
    """
    out = torch.empty_like(rows.inv_norm)
    row16 = 0 if kernel is None else kernel.shape[-1] // 16
    found = (rows.inv_norm, rows.scale, *[None] * 4, weight, kernel, own, out, None)
    run(beside(tokens), layout, *found, (0, 1, 1), (0, 0), row16=row16)
    return out
