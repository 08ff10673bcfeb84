"""prune: relevance, GSP, QCSP and their intersection in six launches, whatever the batch.

1. the mean query vector; 2. one pass over the tokens: norms, raw relevance and its range; 3. one pass over the upper
triangle of S: a tile becomes L = diag(r) S diag(r) and, its even-odd half, the degrees and sums of GSP on both of its
sides; 4. GSP's choice; 5. the greedy ranking, which ends once it has met `keep` of GSP's tokens, for those are the
result; 6. the intersection. Every further round of GSP takes two launches more, no query one less.

Images of up to WIDEST tokens have L in memory; longer ones have their kernel rows computed from the tokens. Packed
segments (`prune_varlen`) run through the same kernels with the same bits. The host knows the lengths' sum T alone, so
their L is a (T, min(T, WIDEST)) buffer: memory is the price of not asking the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .bipartite_match import PLANES, add_sums, tile_sums
from .dpp_map import launch_greedy, plan_greedy
from .gsp import launch_select
from .kernel_matrix import CHUNK, CLEAR_BLOCK
from .query_relevance import launch_mean_query, min_max
from .tokens import (
    cosine_tile,
    dense_layout,
    device_guard,
    dot_tile,
    launch_token_pass,
    locate,
    register_limit,
    saturate,
    segment,
    slot_count,
)

WIDEST = 8192  # L of an image of more tokens is not kept in memory
# dtype -> tile edge, columns per product, warps, pipeline stages. fp32 products run on the ordinary cores.
JOINT_TILES = {
    torch.bfloat16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BT": 32, "BD": 16, "num_warps": 4, "num_stages": 3},
}
JOINT_REGISTERS = 255
FANOUT = 16  # programs that share one row of tiles
BLOCK_RANKS = 1024
INTERSECT_WARPS = 4


@triton.jit
def joint_kernel(
    p_tokens,
    p_inv,
    p_scale,
    p_score,
    p_range,  # read when QUERY
    p_relevance,  # fp32, one per token, written: +inf marks a bad token
    p_kernel,  # fp32 (B, N, N), or (T, width) when VARLEN; segments of more than `width` tokens are left out
    p_sums,
    p_clear,  # int64 (n_clear), set to zero on the way
    p_cu,
    n_clear,
    stride_b,
    stride_n,
    stride_d,
    stride_kb,
    width,
    S,
    N,
    D,
    slots,
    fan,
    rows,
    threshold,
    QUERY: tl.constexpr,
    VARLEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BCLEAR: tl.constexpr,
):
    """Tiles on and above the diagonal of S, every `fan`-th of one row of tiles: L, relevance and GSP's sums."""
    pid = tl.program_id(0)
    for i_clear in range(pid * BCLEAR, n_clear, tl.num_programs(0) * BCLEAR):
        o_clear = i_clear + tl.arange(0, BCLEAR)
        tl.store(p_clear + o_clear, tl.zeros([BCLEAR], dtype=tl.int64), mask=o_clear < n_clear)

    i_slot = pid // fan
    i_fan = pid - i_slot * fan
    i_s, i_m, first, n = locate(p_cu, i_slot, S, N, slots, BT, VARLEN)
    if i_m * BT >= n:
        return
    if VARLEN:
        p_x = p_tokens + first * stride_n
        p_k = p_kernel + first * width
    else:
        p_x = p_tokens + i_s.to(tl.int64) * stride_b
        p_k = p_kernel + i_s.to(tl.int64) * stride_kb
    low = tl.full([], 0, dtype=tl.int32)
    high = low
    if QUERY:
        low = tl.load(p_range + 2 * i_s)
        high = tl.load(p_range + 2 * i_s + 1)

    # Everything about the row of tiles is recomputed: what is kept across tiles costs registers in the products.
    for i_n in tl.range(i_m + i_fan, tl.cdiv(n, BT), fan, disable_licm=True):
        o_m = i_m * BT + tl.arange(0, BT)
        m_m = o_m < n
        b_inv_m = tl.load(p_inv + first + o_m, mask=m_m, other=0.0)
        b_scale_m = tl.load(p_scale + first + o_m, mask=m_m, other=1.0)
        b_score_m = tl.load(p_score + first + o_m, mask=m_m, other=0.0)
        b_r_m = min_max(b_score_m, low, high)
        if i_n == i_m:
            tl.store(p_relevance + first + o_m, tl.where(b_score_m == float("inf"), b_score_m, b_r_m), mask=m_m)
        p_m = p_x + o_m.to(tl.int64) * stride_n
        m_m_even = m_m & (o_m % 2 == 0)
        m_m_odd = m_m & (o_m % 2 == 1)
        o_n = i_n * BT + tl.arange(0, BT)
        m_n = o_n < n
        b_inv_n = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
        b_scale_n = tl.load(p_scale + first + o_n, mask=m_n, other=1.0)
        b_r_n = min_max(tl.load(p_score + first + o_n, mask=m_n, other=0.0), low, high)
        p_n = p_x + o_n.to(tl.int64) * stride_n
        b_dot = tl.zeros([BT, BT], dtype=tl.float32)
        for i_d in range(0, D, CHUNK):  # short chains: tensor cores truncate as they accumulate
            o_d = tl.cast(i_d, tl.int64) * stride_d
            b_dot += dot_tile(
                p_m + o_d,
                m_m,
                b_scale_m,
                stride_d,
                p_n + o_d,
                m_n,
                b_scale_n,
                stride_d,
                tl.minimum(D - i_d, CHUNK),
                SCALED,
                BT,
                BT,
                BD,
                PRECISION,
            )
        b_sim = cosine_tile(b_dot, b_inv_m, b_inv_n)  # [BT, BT]

        m_n_even = m_n & (o_n % 2 == 0)
        m_n_odd = m_n & (o_n % 2 == 1)
        b_degree, b_near, b_all = tile_sums(b_sim, m_m_even[:, None] & m_n_odd[None, :], threshold, 1)
        add_sums(p_sums, first + o_m // 2, m_m_even, rows, b_degree, b_near, b_all)
        if i_n > i_m:
            b_degree, b_near, b_all = tile_sums(b_sim, m_m_odd[:, None] & m_n_even[None, :], threshold, 0)
            add_sums(p_sums, first + o_n // 2, m_n_even, rows, b_degree, b_near, b_all)

        if n <= width:
            b_k = b_sim * (b_r_m[:, None] * b_r_n[None, :])
            b_diag = tl.where(b_inv_m > 0.0, b_r_m * b_r_m, 0.0)
            b_k = tl.where(o_m[:, None] == o_n[None, :], b_diag[:, None], b_k)
            m_k = m_m[:, None] & m_n[None, :]
            o_t = tl.arange(0, BT)
            p_upper = p_k + (tl.cast(i_m, tl.int64) * width + i_n) * BT + (o_t[:, None] * width + o_t[None, :])
            p_lower = p_k + (tl.cast(i_n, tl.int64) * width + i_m) * BT + (o_t[None, :] * width + o_t[:, None])
            tl.store(p_upper, b_k, mask=m_k & (o_m[:, None] <= o_n[None, :]))
            tl.store(p_lower, b_k, mask=m_k & (o_m[:, None] < o_n[None, :]))


@triton.jit
def intersect_kernel(
    p_ranking,  # (S, K) int64, best first, -1 past its end
    p_mask,  # uint8, one per token, read when MASKED
    p_flag,  # uint8, one per token, scratch
    p_keep,  # (S,) int32, read when VARLEN
    p_out,  # int64, `keep` per image
    p_cu,
    N,
    K,
    keep,
    MASKED: tl.constexpr,
    VARLEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One image per program: the first `keep` ranked tokens in the mask, filled up from the rest, ascending."""
    i_s = tl.program_id(0)
    first, n = segment(p_cu, i_s, N, VARLEN)
    i_out = i_s.to(tl.int64) * keep
    i_base = first * 0
    if VARLEN:
        i_base = first
        i_out = first * 0
        for i_c in range(0, i_s, BLOCK):
            o_s = i_c + tl.arange(0, BLOCK)
            i_out += tl.sum(tl.load(p_keep + o_s, mask=o_s < i_s, other=0).to(tl.int64), axis=0)
        keep = tl.load(p_keep + i_s)

    for i_c in range(0, n, BLOCK):
        o_n = i_c + tl.arange(0, BLOCK)
        tl.store(p_flag + first + o_n, tl.zeros([BLOCK], dtype=tl.uint8), mask=o_n < n)
    hits = 0
    if MASKED:
        for i_c in range(0, K, BLOCK):
            o_k = i_c + tl.arange(0, BLOCK)
            b_j = tl.load(p_ranking + i_s.to(tl.int64) * K + o_k, mask=o_k < K, other=-1)
            b_in = tl.load(p_mask + first + b_j, mask=(b_j >= 0) & (b_j < n), other=0)
            hits += tl.sum((b_in != 0).to(tl.int32), axis=0)
    fill = tl.maximum(keep - hits, 0)
    tl.debug_barrier()

    inside = 0
    outside = 0
    for i_c in range(0, K, BLOCK):
        o_k = i_c + tl.arange(0, BLOCK)
        b_j = tl.load(p_ranking + i_s.to(tl.int64) * K + o_k, mask=o_k < K, other=-1)
        m_j = (b_j >= 0) & (b_j < n)
        m_in = m_j & False
        if MASKED:
            m_in = m_j & (tl.load(p_mask + first + b_j, mask=m_j, other=0) != 0)
        m_out = m_j & (m_in == 0)
        b_in = tl.cumsum(m_in.to(tl.int32), axis=0) + inside
        b_out = tl.cumsum(m_out.to(tl.int32), axis=0) + outside
        m_take = (m_in & (b_in <= keep)) | (m_out & (b_out <= fill))
        tl.store(p_flag + first + b_j, tl.full([BLOCK], 1, dtype=tl.uint8), mask=m_take)
        inside += tl.sum(m_in.to(tl.int32), axis=0)
        outside += tl.sum(m_out.to(tl.int32), axis=0)
    tl.debug_barrier()

    taken = 0
    for i_c in range(0, n, BLOCK):
        o_n = i_c + tl.arange(0, BLOCK)
        b_flag = tl.load(p_flag + first + o_n, mask=o_n < n, other=0).to(tl.int32)
        b_place = tl.cumsum(b_flag, axis=0) + taken - 1
        tl.store(p_out + i_out + b_place, i_base + o_n, mask=b_flag != 0)
        taken += tl.sum(b_flag, axis=0)


def launch_joint(
    tokens: torch.Tensor,
    inv_norm: torch.Tensor,
    scale: torch.Tensor,
    score: torch.Tensor,
    score_range: torch.Tensor | None,
    sums: torch.Tensor,
    clear: torch.Tensor,
    threshold: float,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance (rows,) and L (B, N, N) or (T, width), GSP's sums on the way; L is empty where images are too long."""
    segments, n, strides = dense_layout(tokens, cu_seqlens)
    varlen = cu_seqlens is not None
    tile = JOINT_TILES[tokens.dtype]
    slots, total = slot_count(segments, n, tile["BT"], varlen)
    fan = min(triton.cdiv(n, tile["BT"]), FANOUT)
    relevance = torch.empty_like(score)
    if varlen:
        width = min(n, WIDEST)
        kernel = torch.empty((n, width), dtype=torch.float32, device=tokens.device)
    else:
        width = n if n <= WIDEST else 0
        kernel = torch.empty((segments, width, width), dtype=torch.float32, device=tokens.device)
    with device_guard(tokens):
        joint_kernel[(total * fan,)](
            tokens,
            inv_norm,
            scale,
            score,
            score if score_range is None else score_range,
            relevance,
            kernel,
            sums,
            clear,
            score if cu_seqlens is None else cu_seqlens,
            clear.numel(),
            *strides,
            width * width,
            width,
            segments,
            n,
            tokens.shape[-1],
            slots,
            fan,
            sums.shape[1],
            saturate(threshold),
            QUERY=score_range is not None,
            VARLEN=varlen,
            SCALED=tokens.dtype != torch.float16,
            PRECISION="ieee",
            CHUNK=CHUNK,
            BCLEAR=CLEAR_BLOCK,
            **register_limit(tokens.device, JOINT_REGISTERS),
            **tile,
        )
    return relevance, kernel


def launch_intersect(
    ranking: torch.Tensor,
    mask: torch.Tensor | None,
    n: int,
    keep: int,
    total: int,
    counts: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """(total,) int64: per segment the ranked tokens in `mask` (all without one), filled from the rest, ascending."""
    segments, k = ranking.shape
    varlen = cu_seqlens is not None
    rows = n if varlen else segments * n
    flag = torch.empty(rows, dtype=torch.uint8, device=ranking.device)
    out = torch.empty(total, dtype=torch.int64, device=ranking.device)
    with device_guard(ranking):
        intersect_kernel[(segments,)](
            ranking,
            flag if mask is None else mask.view(torch.uint8),
            flag,
            flag if counts is None else counts,
            out,
            flag if cu_seqlens is None else cu_seqlens,
            n,
            k,
            keep,
            MASKED=mask is not None,
            VARLEN=varlen,
            BLOCK=BLOCK_RANKS,
            num_warps=INTERSECT_WARPS,
        )
    return out


def prune_segments(
    tokens: torch.Tensor,
    query: torch.Tensor | None,
    keep: Sequence[int],
    *,
    aligned: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    negate: bool,
    gsp_drop: float,
    oversample: float,
    combine: str,
    threshold: float,
    gamma: float,
    min_degree: int,
    rounds: int,
    cu_seqlens: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept tokens of all images one after another. `keep` per segment, or one for all images of a dense batch.

    counts, limits: for packed segments, `keep` and the length of the ranking on the device, (S,) int32.
    """
    segments, n, _ = dense_layout(tokens, cu_seqlens)
    varlen = cu_seqlens is not None
    intersect = combine == "intersect"
    most = max(keep)
    k = min(n, math.ceil(oversample * most)) if intersect else most

    mean_query, score_range = None, None
    if query is not None:
        mean_query, score_range = launch_mean_query(query, query_mask, negate, segments)
    inv_norm, scale, score, sums = launch_token_pass(
        tokens,
        aligned if query is not None else None,
        mean_query,
        score_range,
        cu_seqlens=cu_seqlens,
        score=True,
        planes=PLANES,
    )

    with_kernel = varlen or n <= WIDEST
    upto = min(n, WIDEST)
    plans = []
    if with_kernel:
        plans.append(plan_greedy(tokens.device, segments, n, k, varlen=varlen, upto=upto))
    if n > WIDEST:
        plans.append(plan_greedy(tokens.device, segments, n, k, features=True, varlen=varlen))
    buffers = [plan.slot_buffer(tokens.device) for plan in plans]
    clear = buffers[0] if len(buffers) == 1 else torch.cat([b.view(-1) for b in buffers])
    relevance, kernel = launch_joint(tokens, inv_norm, scale, score, score_range, sums, clear, threshold, cu_seqlens)
    mask, _ = launch_select(
        tokens,
        inv_norm,
        scale,
        sums,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
        keep=n - math.floor(gsp_drop * n),
        gsp_drop=gsp_drop,
        cu_seqlens=cu_seqlens,
    )

    if cu_seqlens is None:
        need: int | torch.Tensor = most
    else:
        assert counts is not None
        need = counts
    options: dict[str, Any] = {"inv_norm": inv_norm, "scale": scale, "cu_seqlens": cu_seqlens}
    options |= {"stop": mask, "need": need, "limits": limits} if intersect else {"tier": mask, "limits": counts}
    picks = None
    for i, plan in enumerate(plans):
        offset = sum(b.numel() for b in buffers[:i])
        slots = clear.view(-1)[offset : offset + buffers[i].numel()].view(buffers[i].shape)
        source: dict[str, Any] = (
            {"kernel": kernel, "upto": upto} if with_kernel and i == 0 else {"tokens": tokens, "above": upto}
        )
        if not with_kernel:
            source["above"] = 0
        picks = launch_greedy(relevance, k, plan, slots, **source, **options, out=picks)
    assert picks is not None
    return launch_intersect(
        picks[0],
        mask if intersect else None,
        n,
        most,
        sum(keep) if varlen else segments * most,
        counts,
        cu_seqlens,
    )


def launch_prune(
    tokens: torch.Tensor,
    query: torch.Tensor | None,
    keep: int,
    aligned: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
) -> torch.Tensor:
    """Indices (B, keep) int64, ascending, of the tokens (B, N, D) to keep."""
    batch = tokens.shape[0]
    if batch == 0:
        return torch.empty((0, keep), dtype=torch.int64, device=tokens.device)
    return prune_segments(
        tokens,
        query,
        [keep],
        aligned=aligned,
        query_mask=query_mask,
        negate=negate,
        gsp_drop=gsp_drop,
        oversample=oversample,
        combine=combine,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
    ).view(batch, keep)


def _example(
    dtype: torch.dtype, *, query: bool = True, aligned: bool = False, combine: str = "intersect"
) -> torch.Tensor:
    tokens = torch.empty(8, 576, 4096, dtype=dtype, device="meta")
    return launch_prune(
        tokens,
        torch.empty(8, 20, 1024 if aligned else 4096, dtype=dtype, device="meta") if query else None,
        64,
        torch.empty(8, 576, 1024, dtype=dtype, device="meta") if aligned else None,
        combine=combine,
    )


LAUNCH_TABLE = (
    ("bf16", lambda: _example(torch.bfloat16)),
    ("fp16 no query", lambda: _example(torch.float16, query=False)),
    ("fp32 aligned, restrict", lambda: _example(torch.float32, aligned=True, combine="restrict")),
)
