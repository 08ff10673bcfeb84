"""Every source token (even position) against every destination token (odd position), with no similarity matrix.

A program multiplies one tile of sources with tiles of destinations and reduces degree, sums and best match in
registers. What tiles contribute to a source is added up across programs by integer atomics: similarities are summed in
fixed point (2^-24), so the result is exact addition and does not depend on order, tile shape or batch. The best match
travels as one 64-bit maximum of (order key of the similarity, reversed destination).
"""

import torch
import triton
import triton.language as tl

from .tokens import (
    cosine_tile,
    dense_layout,
    device_guard,
    dot_tile,
    from_order_key,
    launch_token_pass,
    locate,
    order_key,
    saturate,
    slot_count,
)

PLANES = 3  # degree, sum of the similarities over the threshold, sum of all
FIXED = tl.constexpr(16777216.0)  # 2^24: a tile of 64 cosines stays below 2^31

# One row per kind of input: tile of rows and columns, depth of a step, warps, pipeline stages.
MATCH_TILES = {
    torch.bfloat16: {"BM": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
    torch.float16: {"BM": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
    torch.float32: {"BM": 32, "BN": 32, "BD": 32, "num_warps": 4, "num_stages": 2},
}
MAX_SPLITS = 16  # programs that share the destinations of one tile of sources
BLOCK_FINISH = 256


@triton.jit
def round_sizes(n, keep, rounds, ROUND: tl.constexpr):
    """Tokens left before round ROUND and the number it drops: the quota is spread over the rounds."""
    left = n - keep
    drop = tl.cdiv(left, rounds)
    for i_round in tl.static_range(ROUND):
        n = n - drop
        left = left - drop
        drop = tl.cdiv(left, rounds - i_round - 1)
    return n, drop


@triton.jit
def gsp_keep(n, keep, drop_bits, VARLEN: tl.constexpr):
    """Tokens that GSP keeps: given for images, n - floor(gsp_drop * n) in double arithmetic for segments."""
    if VARLEN:
        share = drop_bits.to(tl.int64).to(tl.float64, bitcast=True)
        keep = n - tl.floor(n.to(tl.float64) * share).to(tl.int32)
    return keep


@triton.jit
def tile_sums(b_sim, m_pair, threshold, AXIS: tl.constexpr):
    """Degree (int32) and fixed-point sums over the threshold and over all (int32), along AXIS of a tile."""
    m_near = m_pair & (b_sim >= threshold)
    b_fixed = (b_sim * FIXED).to(tl.int32)
    b_degree = tl.sum(m_near.to(tl.int32), axis=AXIS)
    b_near = tl.sum(tl.where(m_near, b_fixed, 0), axis=AXIS)
    b_all = tl.sum(tl.where(m_pair, b_fixed, 0), axis=AXIS)
    return b_degree, b_near, b_all


@triton.jit
def add_sums(p_sums, o_flat, m_s, rows, b_degree, b_near, b_all):
    p_degree = p_sums + o_flat
    tl.atomic_add(p_degree, b_degree.to(tl.int64), mask=m_s, sem="relaxed")
    tl.atomic_add(p_degree + rows, b_near.to(tl.int64), mask=m_s, sem="relaxed")
    tl.atomic_add(p_degree + rows + rows, b_all.to(tl.int64), mask=m_s, sem="relaxed")


@triton.jit
def load_sums(p_sums, o_flat, m_s, rows, destinations):
    """Degree (int32), mean over the near ones and density (fp32) of each source from its integer sums."""
    p_degree = p_sums + o_flat
    b_degree = tl.load(p_degree, mask=m_s, other=0).to(tl.int32)
    b_near = tl.load(p_degree + rows, mask=m_s, other=0).to(tl.float32)
    b_all = tl.load(p_degree + rows + rows, mask=m_s, other=0).to(tl.float32)
    b_mean = b_near / (tl.maximum(b_degree, 1).to(tl.float32) * FIXED)
    b_density = b_all / (tl.maximum(destinations, 1).to(tl.float32) * FIXED)
    return b_degree, b_mean, b_density


@triton.jit(do_not_specialize=["drop_bits"])
def match_kernel(
    p_tokens,
    p_inv,
    p_scale,
    p_list,  # int32 survivors of each segment, ascending; read when ROUND > 0
    p_sums,  # (PLANES (+ 1 if BEST), rows) int64
    p_cu,
    stride_b,
    stride_n,
    stride_d,
    S,
    N,
    D,
    slots,
    splits,
    rows,
    keep,
    drop_bits,
    rounds,
    threshold,
    ROUND: tl.constexpr,
    BEST: tl.constexpr,
    VARLEN: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of sources against every `splits`-th tile of destinations; adds to the integer sums of its sources."""
    i_slot = tl.program_id(0) // splits
    i_split = tl.program_id(0) - i_slot * splits
    i_s, i_tile, first, n = locate(p_cu, i_slot, S, N, slots, 2 * BM, VARLEN)
    n, _ = round_sizes(n, gsp_keep(n, keep, drop_bits, VARLEN), rounds, ROUND)
    sources = (n + 1) // 2
    destinations = n // 2
    tiles = tl.cdiv(destinations, BN)
    if (i_tile * BM >= sources) | (i_split >= tiles):
        return
    p_image = p_tokens
    if VARLEN:
        p_image += first * stride_n
    else:
        p_image += i_s.to(tl.int64) * stride_b

    o_s = i_tile * BM + tl.arange(0, BM)
    m_s = o_s < sources
    o_a = 2 * o_s
    if ROUND > 0:
        o_a = tl.load(p_list + first + o_a, mask=m_s, other=0)
    b_inv_a = tl.load(p_inv + first + o_a, mask=m_s, other=0.0)
    b_scale_a = tl.load(p_scale + first + o_a, mask=m_s, other=1.0)
    p_a = p_image + o_a.to(tl.int64) * stride_n

    b_degree = tl.zeros([BM], dtype=tl.int32)
    b_near = tl.zeros([BM], dtype=tl.int64)
    b_all = tl.zeros([BM], dtype=tl.int64)
    b_best = tl.full([BM], -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    for i_t in range(i_split, tiles, splits):
        o_t = i_t * BN + tl.arange(0, BN)
        m_t = o_t < destinations
        o_b = 2 * o_t + 1
        if ROUND > 0:
            o_b = tl.load(p_list + first + o_b, mask=m_t, other=0)
        b_inv_b = tl.load(p_inv + first + o_b, mask=m_t, other=0.0)
        b_scale_b = tl.load(p_scale + first + o_b, mask=m_t, other=1.0)
        p_b = p_image + o_b.to(tl.int64) * stride_n
        b_dot = dot_tile(p_a, m_s, b_scale_a, stride_d, p_b, m_t, b_scale_b, stride_d, D, SCALED, BM, BN, BD, PRECISION)
        b_sim = cosine_tile(b_dot, b_inv_a, b_inv_b)  # [BM, BN]
        m_pair = m_s[:, None] & m_t[None, :]
        b_tile_degree, b_tile_near, b_tile_all = tile_sums(b_sim, m_pair, threshold, 1)
        b_degree += b_tile_degree
        b_near += b_tile_near
        b_all += b_tile_all
        if BEST:
            b_key = tl.where(m_pair, order_key(b_sim), -0x7FFFFFFF)
            b_max = tl.max(b_key, axis=1)
            b_arg = tl.min(tl.where(b_key == b_max[:, None], o_b[None, :], 0x7FFFFFFF), axis=1)
            b_best = tl.maximum(b_best, (b_max.to(tl.int64) << 32) | (0x7FFFFFFF - b_arg).to(tl.int64))
    add_sums(p_sums, first + o_s, m_s, rows, b_degree, b_near, b_all)
    if BEST:
        tl.atomic_max(p_sums + first + o_s + rows + rows + rows, b_best, mask=m_s, sem="relaxed")


@triton.jit
def finish_kernel(p_sums, p_best, p_match, p_degree, p_mean, p_density, S, N, slots, rows, BLOCK: tl.constexpr):
    """The five outputs per source token from the integer sums."""
    i_s, i_tile, first, n = locate(p_sums, tl.program_id(0), S, N, slots, 2 * BLOCK, False)
    sources = (n + 1) // 2
    destinations = n // 2
    o_s = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < sources
    b_degree, b_mean, b_density = load_sums(p_sums, first + o_s, m_s, rows, destinations)
    b_packed = tl.load(p_sums + first + o_s + rows + rows + rows, mask=m_s, other=0)
    b_best = from_order_key((b_packed >> 32).to(tl.int32))
    b_match = 0x7FFFFFFF - (b_packed & 0x7FFFFFFF).to(tl.int32)
    m_any = destinations > 0
    o_out = i_s.to(tl.int64) * sources + o_s
    tl.store(p_best + o_out, tl.where(m_any, b_best, 0.0), mask=m_s)
    tl.store(p_match + o_out, tl.where(m_any, b_match, -1), mask=m_s)
    tl.store(p_degree + o_out, b_degree, mask=m_s)
    tl.store(p_mean + o_out, b_mean, mask=m_s)
    tl.store(p_density + o_out, b_density, mask=m_s)


def launch_match(
    tokens: torch.Tensor,
    inv_norm: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    threshold: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
    survivors: torch.Tensor | None = None,
    keep: int = 0,
    drop_bits: int = 0,
    rounds: int = 1,
    at_round: int = 0,
    best: bool = False,
) -> None:
    """Adds degree and sums of round `at_round` to `sums` (cleared before): one launch."""
    segments, n, strides = dense_layout(tokens, cu_seqlens)
    varlen = cu_seqlens is not None
    tile = MATCH_TILES[tokens.dtype]
    slots, total = slot_count(segments, n, 2 * tile["BM"], varlen)
    splits = max(1, min(MAX_SPLITS, triton.cdiv(n // 2, tile["BN"])))
    with device_guard(tokens):
        match_kernel[(total * splits,)](
            tokens,
            inv_norm,
            scale,
            sums if survivors is None else survivors,
            sums,
            sums if cu_seqlens is None else cu_seqlens,
            *strides,
            segments,
            n,
            tokens.shape[-1],
            slots,
            splits,
            sums.shape[1],
            keep,
            drop_bits,
            rounds,
            saturate(threshold),
            ROUND=at_round,
            BEST=best,
            VARLEN=varlen,
            SCALED=tokens.dtype != torch.float16,
            PRECISION="ieee",
            **tile,
        )


def launch_bipartite_match(
    tokens: torch.Tensor, threshold: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best, match, degree, mean, density per source token of (B, N, D): each (B, ceil(N / 2)). Three launches."""
    segments, n, _ = dense_layout(tokens, None)
    sources = (n + 1) // 2
    device = tokens.device
    best = torch.empty((segments, sources), dtype=torch.float32, device=device)
    match = torch.empty((segments, sources), dtype=torch.int32, device=device)
    degree = torch.empty_like(match)
    mean = torch.empty_like(best)
    density = torch.empty_like(best)
    if segments and n:
        inv_norm, scale, _, sums = launch_token_pass(tokens, planes=PLANES + 1, best=True)
        launch_match(tokens, inv_norm, scale, sums, threshold, keep=n, best=True)
        slots, total = slot_count(segments, n, 2 * BLOCK_FINISH, False)
        with device_guard(tokens):
            finish_kernel[(total,)](
                sums, best, match, degree, mean, density, segments, n, slots, sums.shape[1], BLOCK=BLOCK_FINISH
            )
    return best, match, degree, mean, density


def _example(dtype: torch.dtype, n: int = 576) -> tuple[torch.Tensor, ...]:
    return launch_bipartite_match(torch.empty(8, n, 1024, dtype=dtype, device="meta"))


LAUNCH_TABLE = (
    ("bf16", lambda: _example(torch.bfloat16)),
    ("fp16", lambda: _example(torch.float16)),
    ("fp32", lambda: _example(torch.float32)),
    ("bf16 N=1", lambda: _example(torch.bfloat16, 1)),
)
