"""Graph-structured pruning: scores the source tokens by their redundancy and drops the highest, round by round.

A round is two launches: `match_kernel` leaves degree and sums per source, `select_kernel` turns them into redundancy,
finds the q-th largest by its digits (16 counts at a time, no sort), drops what lies above it and, among the equal, the
highest indices, and writes the list of survivors. Every round has a size known beforehand, so nothing returns to the
host.
"""

import math
import struct

import torch
import triton
import triton.language as tl

from .bipartite_match import PLANES, gsp_keep, launch_match, load_sums, round_sizes
from .tokens import dense_layout, device_guard, launch_token_pass, order_key, saturate, segment

BLOCK_SOURCES = 512
SELECT_WARPS = 8


@triton.jit(do_not_specialize=["drop_bits"])
def select_kernel(
    p_sums,  # (PLANES, rows) int64; left cleared
    p_list,  # int32 survivors of each segment before this round; read when ROUND > 0
    p_next,  # int32 survivors after it; written unless LAST
    p_mask,  # uint8, one per token
    p_redundancy,  # fp32, one per token
    p_cu,
    N,
    rows,
    keep,
    drop_bits,
    rounds,
    threshold,
    gamma,
    min_degree,
    ROUND: tl.constexpr,
    LAST: tl.constexpr,
    VARLEN: tl.constexpr,
    BS: tl.constexpr,
):
    """One image per program: redundancy of the sources of this round, and the round's quota dropped."""
    first, n = segment(p_cu, tl.program_id(0), N, VARLEN)
    n, drop = round_sizes(n, gsp_keep(n, keep, drop_bits, VARLEN), rounds, ROUND)
    sources = (n + 1) // 2
    destinations = n // 2
    drop = tl.minimum(drop, sources)

    # rho = degree * exp(gamma * (mean - threshold)); below min_degree half of it plus half the density.
    # Its unsigned order key takes the place of the degree in p_sums.
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        m_s = o_s < sources
        b_degree, b_mean, b_density = load_sums(p_sums, first + o_s, m_s, rows, destinations)
        b_rho = tl.where(b_degree > 0, b_degree.to(tl.float32) * tl.exp(gamma * (b_mean - threshold)), 0.0)
        b_rho = tl.where(b_degree >= min_degree, b_rho, 0.5 * b_rho + 0.5 * b_density)
        o_source = 2 * o_s
        o_other = 2 * o_s + 1
        if ROUND > 0:
            o_source = tl.load(p_list + first + o_source, mask=m_s, other=0)
        else:
            tl.store(p_redundancy + first + o_other, tl.zeros_like(b_rho), mask=o_s < destinations)
        tl.store(p_redundancy + first + o_source, b_rho, mask=m_s)
        tl.store(p_sums + first + o_s, order_key(b_rho).to(tl.int64) + 0x80000000, mask=m_s)
    tl.debug_barrier()

    # `bar`: the drop-th largest key, four bits at a time from the top
    bar = tl.full([], 0, dtype=tl.int64)
    o_digit = tl.arange(0, 16)
    for i_digit in tl.static_range(8):
        b_bar = bar + (o_digit.to(tl.int64) << (28 - 4 * i_digit))  # [16]
        b_count = tl.zeros([16], dtype=tl.int32)
        for i_c in range(0, sources, BS):
            o_s = i_c + tl.arange(0, BS)
            b_key = tl.load(p_sums + first + o_s, mask=o_s < sources, other=-1)
            b_count += tl.sum((b_key[:, None] >= b_bar[None, :]).to(tl.int32), axis=0)
        digit = tl.sum((b_count >= drop).to(tl.int32), axis=0) - 1
        bar += digit.to(tl.int64) << (28 - 4 * i_digit)

    above = 0
    equal = 0
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        b_key = tl.load(p_sums + first + o_s, mask=o_s < sources, other=-1)
        above += tl.sum((b_key > bar).to(tl.int32), axis=0)
        equal += tl.sum((b_key == bar).to(tl.int32), axis=0)
    spared = equal - (drop - above)  # of the equal ones, the first `spared` stay

    equal = 0
    dropped = 0
    for i_c in range(0, sources, BS):
        o_s = i_c + tl.arange(0, BS)
        m_s = o_s < sources
        m_d = o_s < destinations
        b_key = tl.load(p_sums + first + o_s, mask=m_s, other=-1)
        m_equal = b_key == bar
        b_equal = tl.cumsum(m_equal.to(tl.int32), axis=0) + equal
        m_drop = (b_key > bar) | (m_equal & (b_equal > spared))
        b_dropped = tl.cumsum(m_drop.to(tl.int32), axis=0) + dropped
        o_source = 2 * o_s
        o_other = 2 * o_s + 1
        if ROUND > 0:
            o_source = tl.load(p_list + first + o_source, mask=m_s, other=0)
            o_other = tl.load(p_list + first + o_other, mask=m_d, other=0)
        else:
            tl.store(p_mask + first + o_other, tl.full([BS], 1, dtype=tl.uint8), mask=m_d)
        tl.store(p_mask + first + o_source, tl.where(m_drop, 0, 1).to(tl.uint8), mask=m_s)
        if not LAST:
            b_before = b_dropped - m_drop.to(tl.int32)
            tl.store(p_next + first + 2 * o_s - b_before, o_source, mask=m_s & (m_drop == 0))
            tl.store(p_next + first + 2 * o_s + 1 - b_dropped, o_other, mask=m_d)
            b_zero = tl.zeros([BS], dtype=tl.int64)
            tl.store(p_sums + first + o_s, b_zero, mask=m_s)
            tl.store(p_sums + first + o_s + rows, b_zero, mask=m_s)
            tl.store(p_sums + first + o_s + rows + rows, b_zero, mask=m_s)
        equal += tl.sum(m_equal.to(tl.int32), axis=0)
        dropped += tl.sum(m_drop.to(tl.int32), axis=0)


def double_bits(value: float) -> int:
    """The 64 bits of a double as a signed integer: kernel arguments that are floats would arrive in fp32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def launch_select(
    tokens: torch.Tensor,
    inv_norm: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    *,
    threshold: float,
    gamma: float,
    min_degree: int,
    rounds: int,
    keep: int = 0,
    gsp_drop: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (rows,) bool and redundancy (rows,) fp32, given the sums of round 0. Two launches a round, less one.

    Images keep `keep` tokens, packed segments n - floor(gsp_drop * n).
    """
    segments, n, _ = dense_layout(tokens, cu_seqlens)
    rows = sums.shape[1]
    device = tokens.device
    mask = torch.empty(rows, dtype=torch.bool, device=device)
    redundancy = torch.empty(rows, dtype=torch.float32, device=device)
    varlen = cu_seqlens is not None
    # A round drops one token at least; once there is nothing to drop, further rounds would score the same split.
    rounds = min(rounds, (math.floor(gsp_drop * n) if varlen else n - keep) + 1)
    lists = [torch.empty(rows, dtype=torch.int32, device=device) for _ in range(min(rounds - 1, 2))]
    drop_bits = double_bits(gsp_drop)
    for at_round in range(rounds):
        survivors = lists[(at_round - 1) % 2] if at_round else None
        if at_round:
            launch_match(
                tokens,
                inv_norm,
                scale,
                sums,
                threshold,
                cu_seqlens=cu_seqlens,
                survivors=survivors,
                keep=keep,
                drop_bits=drop_bits,
                rounds=rounds,
                at_round=at_round,
            )
        last = at_round == rounds - 1
        with device_guard(tokens):
            select_kernel[(segments,)](
                sums,
                redundancy if survivors is None else survivors,
                redundancy if last else lists[at_round % 2],
                mask.view(torch.uint8),
                redundancy,
                redundancy if cu_seqlens is None else cu_seqlens,
                n,
                rows,
                keep,
                drop_bits,
                rounds,
                saturate(threshold),
                saturate(gamma),
                min_degree,
                ROUND=at_round,
                LAST=last,
                VARLEN=varlen,
                BS=BLOCK_SOURCES,
                num_warps=SELECT_WARPS,
            )
    return mask, redundancy


def launch_gsp(
    tokens: torch.Tensor,
    keep: int,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (B, N) bool of exactly `keep` tokens per image and redundancy (B, N) fp32. 1 + 2 * rounds launches."""
    segments, n, _ = dense_layout(tokens, None)
    if segments == 0 or n == 0:
        return (
            torch.empty((segments, n), dtype=torch.bool, device=tokens.device),
            torch.empty((segments, n), dtype=torch.float32, device=tokens.device),
        )
    inv_norm, scale, _, sums = launch_token_pass(tokens, planes=PLANES)
    launch_match(tokens, inv_norm, scale, sums, threshold, keep=keep, rounds=rounds)
    mask, redundancy = launch_select(
        tokens,
        inv_norm,
        scale,
        sums,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
        keep=keep,
    )
    return mask.view(segments, n), redundancy.view(segments, n)


def _example(dtype: torch.dtype, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_gsp(torch.empty(8, 576, 1024, dtype=dtype, device="meta"), 432, rounds=rounds)


LAUNCH_TABLE = (
    ("bf16", lambda: _example(torch.bfloat16, 1)),
    ("bf16 2 rounds", lambda: _example(torch.bfloat16, 2)),
    ("fp32 2 rounds", lambda: _example(torch.float32, 2)),
)
