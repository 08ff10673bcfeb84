"""Relevance of each token to the query: r_i = minmax_i(mean_q cos(a_i, q)).

The mean of cosines is one dot product with the mean unit query vector, so three launches suffice: that vector; one
pass over the tokens, which gives cosines, norms and, by integer atomics on order-preserving keys, the range of each
image; the min-max. `prune` does the third inside its own kernels.
"""

import torch
import triton
import triton.language as tl

from .tokens import (
    SAFE_EXPONENT,
    dense_layout,
    device_guard,
    from_order_key,
    launch_token_pass,
    locate,
    register_limit,
    row_stats,
    slot_count,
    widen,
)

BLOCK_OUT = 128  # columns of the mean query vector per program
QUERY_ROWS = 4  # read at once for the norms, as are QUERY_COLS columns
QUERY_COLS = 1024
QUERY_WARPS = 16
QUERY_REGISTERS = 128
BLOCK_SCORES = 1024
SCORE_WARPS = 4


@triton.jit
def mean_query_kernel(
    p_query,
    p_mask,  # uint8, read when MASKED
    p_mean,  # (queries, C) fp32
    p_range,  # (images, 2) int32
    stride_b,
    stride_q,
    stride_c,
    stride_mb,
    stride_mq,
    images,
    Q,
    C,
    sign,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,  # one query for all images
    BR: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    SCALED: tl.constexpr,
    SAFE: tl.constexpr,
):
    """sign / M * sum of the M unmasked unit query vectors, BO columns of it; resets the range of the scores."""
    blocks = tl.cdiv(C, BO)
    i_c = tl.program_id(0)
    i_b = tl.full([], 0, dtype=tl.int64)
    if not SHARED:
        i_b += i_c // blocks
        i_c = i_c % blocks
    if SHARED:
        for i_s in range(i_c * BO, images, blocks * BO):
            o_s = i_s + tl.arange(0, BO)
            tl.store(p_range + 2 * o_s, 0x7FFFFFFF, mask=o_s < images)
            tl.store(p_range + 2 * o_s + 1, -0x7FFFFFFF, mask=o_s < images)
    elif i_c == 0:
        tl.store(p_range + 2 * i_b, 0x7FFFFFFF)
        tl.store(p_range + 2 * i_b + 1, -0x7FFFFFFF)

    o_out = i_c * BO + tl.arange(0, BO)
    m_out = o_out < C
    b_sum = tl.zeros([BO], dtype=tl.float32)
    b_count = tl.zeros([BR], dtype=tl.int32)
    p_image = p_query + i_b * stride_b
    for i_q in range(0, Q, BR):
        o_q = i_q + tl.arange(0, BR)
        m_q = o_q < Q
        if MASKED:
            m_q = m_q & (tl.load(p_mask + i_b * stride_mb + o_q * stride_mq, mask=m_q, other=0) != 0)
        p_rows = p_image + o_q.to(tl.int64) * stride_q
        b_inv, b_scale, _ = row_stats(p_rows, m_q, stride_c, p_mean, C, False, BR, BC, SCALED, SAFE)
        p_x = p_rows[:, None] + o_out[None, :].to(tl.int64) * stride_c  # [BR, BO]
        b_x = widen(tl.load(p_x, mask=m_q[:, None] & m_out[None, :], other=0.0))
        b_unit = tl.where((b_inv > 0.0)[:, None], b_x * b_scale[:, None] * b_inv[:, None], 0.0)
        b_sum += tl.sum(b_unit, axis=0)
        b_count += m_q.to(tl.int32)
    count = tl.maximum(tl.sum(b_count, axis=0), 1).to(tl.float32)
    tl.store(p_mean + i_b * C + o_out, b_sum * sign / count, mask=m_out)


@triton.jit
def min_max(b_score, low, high):
    """Relevance in [0, 1] from raw scores and the order keys of their range; 0 for bad rows (score +inf)."""
    low = from_order_key(low)
    high = from_order_key(high)
    m_constant = high - low <= 1e-6
    b_r = (b_score - low) / tl.where(m_constant, 1.0, high - low)
    b_r = tl.where(b_score >= high, 1.0, tl.minimum(tl.maximum(b_r, 0.0), 1.0))
    b_r = tl.where(m_constant, 1.0, b_r)
    return tl.where(b_score == float("inf"), 0.0, b_r)


@triton.jit
def min_max_kernel(p_score, p_range, p_relevance, S, N, slots, BLOCK: tl.constexpr):
    i_s, i_tile, first, n = locate(p_range, tl.program_id(0), S, N, slots, BLOCK, False)
    o_n = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_score = tl.load(p_score + first + o_n, mask=m_n, other=0.0)
    b_r = min_max(b_score, tl.load(p_range + 2 * i_s), tl.load(p_range + 2 * i_s + 1))
    tl.store(p_relevance + first + o_n, b_r, mask=m_n)


def launch_mean_query(
    query: torch.Tensor, query_mask: torch.Tensor | None, negate: bool, images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean unit query vectors (B or 1, C) fp32 of (B or 1, Q, C) queries; the score range (images, 2) int32, reset."""
    batch, q, c = query.shape
    if query_mask is not None and query_mask.shape[0] > batch:
        query = query.expand(query_mask.shape[0], q, c)
        batch = query_mask.shape[0]
    mean = torch.empty((batch, c), dtype=torch.float32, device=query.device)
    score_range = torch.empty((images, 2), dtype=torch.int32, device=query.device)
    mask = None
    if query_mask is not None:
        mask = query_mask.expand(batch, q).view(torch.uint8)
    with device_guard(query):
        mean_query_kernel[(batch * triton.cdiv(c, BLOCK_OUT),)](
            query,
            mean if mask is None else mask,
            mean,
            score_range,
            *query.stride(),
            *((0, 0) if mask is None else mask.stride()),
            images,
            q,
            c,
            -1.0 if negate else 1.0,
            MASKED=mask is not None,
            SHARED=batch == 1,
            BR=QUERY_ROWS,
            BC=QUERY_COLS,
            BO=BLOCK_OUT,
            SCALED=query.dtype != torch.float16,
            SAFE=SAFE_EXPONENT,
            num_warps=QUERY_WARPS,
            **register_limit(query.device, QUERY_REGISTERS),
        )
    return mean, score_range


def launch_query_relevance(
    tokens: torch.Tensor, query: torch.Tensor, query_mask: torch.Tensor | None = None, negate: bool = False
) -> torch.Tensor:
    """Relevance (B, N) fp32 in [0, 1] of tokens (B, N, C) to a query (B or 1, Q, C). Three launches."""
    segments, n, _ = dense_layout(tokens, None)
    relevance = torch.empty((segments, n), dtype=torch.float32, device=tokens.device)
    if segments and n:
        mean, score_range = launch_mean_query(query, query_mask, negate, segments)
        _, _, score, _ = launch_token_pass(tokens, mean_query=mean, score_range=score_range, score=True)
        slots, total = slot_count(segments, n, BLOCK_SCORES, False)
        with device_guard(tokens):
            min_max_kernel[(total,)](
                score, score_range, relevance, segments, n, slots, BLOCK=BLOCK_SCORES, num_warps=SCORE_WARPS
            )
    return relevance


def _example(dtype: torch.dtype, masked: bool) -> torch.Tensor:
    tokens = torch.empty(8, 576, 1024, dtype=dtype, device="meta")
    query = torch.empty(8, 20, 1024, dtype=dtype, device="meta")
    mask = torch.empty(8, 20, dtype=torch.bool, device="meta") if masked else None
    return launch_query_relevance(tokens, query, mask)


LAUNCH_TABLE = (
    ("bf16", lambda: _example(torch.bfloat16, False)),
    ("fp16 masked", lambda: _example(torch.float16, True)),
    ("fp32", lambda: _example(torch.float32, False)),
)
