"""The conditional kernel L = diag(r) S diag(r) in fp32, from raw tokens: L_ij = cos(x_i, x_j) r_i r_j.

Products are taken on the raw input dtype and scaled afterwards. Only tiles on and above the diagonal are computed; each
is written twice, and the diagonal tile writes its upper half to both sides, so L is symmetric bit for bit. The diagonal
is r_i^2 exactly, not a rounded cosine: a rounding error there would look like residual variance to the greedy steps.

Tensor cores truncate when they accumulate, a bias that grows with the length of the chain: CHUNK columns at a time go
through one chain, and the partial sums are added in ordinary fp32.

Packed batches (`cu_seqlens`) write row i of the packed tokens to row i of a (T, W) buffer, columns counted from the
segment's start. The length of a segment is known to the device only; W bounds it.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from .tokens import (
    cosine_tile,
    dense_layout,
    device_guard,
    dot_tile,
    launch_token_pass,
    locate,
    register_limit,
    slot_count,
)

CHUNK = 1024
CLEAR_BLOCK = 256

# dtype -> tile edge, columns per product, warps, pipeline stages. fp32 products run on the ordinary cores.
TILES = {
    torch.bfloat16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BT": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BT": 32, "BD": 32, "num_warps": 4, "num_stages": 3},
}
REGISTERS = 255


@triton.jit
def finite_relevance(b_r):
    """Relevance whose square is finite, else 0 (NaN included)."""
    return tl.where(tl.abs(b_r * b_r) < float("inf"), b_r, 0.0)


@triton.jit
def kernel_matrix_kernel(
    p_tokens,
    p_relevance,  # fp32, one per token
    p_inv,  # fp32, one per token: row statistics
    p_scale,  # fp32, one per token: row statistics
    p_kernel,  # fp32 [B, N, N], or [T, W] with VARLEN
    p_cu,  # int32 [S + 1], read with VARLEN
    p_clear,  # int64 [n_clear], set to zero on the way
    n_clear,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_kb,
    stride_kn,
    S,
    N,
    D,
    slots,
    VARLEN: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BCLEAR: tl.constexpr,
):
    i_row, i_fan, n_fan = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    for i_clear in range((i_row * n_fan + i_fan) * BCLEAR, n_clear, tl.num_programs(0) * n_fan * BCLEAR):
        o_clear = i_clear + tl.arange(0, BCLEAR)
        tl.store(p_clear + o_clear, tl.zeros([BCLEAR], dtype=tl.int64), mask=o_clear < n_clear)

    i_s, i_m, first, n = locate(p_cu, i_row, S, N, slots, BT, VARLEN)
    i_n = i_m + i_fan
    if (i_n * BT >= n) | (n > stride_kn):  # past the end, or a segment that this buffer has no room for
        return
    if VARLEN:
        p_x = p_tokens + first * stride_xn
        p_k = p_kernel + first * stride_kn
    else:
        p_x = p_tokens + i_s.to(tl.int64) * stride_xb
        p_k = p_kernel + i_s.to(tl.int64) * stride_kb

    o_m = i_m * BT + tl.arange(0, BT)
    o_n = i_n * BT + tl.arange(0, BT)
    m_m = o_m < n
    m_n = o_n < n
    p_m = p_x + o_m.to(tl.int64) * stride_xn
    p_n = p_x + o_n.to(tl.int64) * stride_xn
    b_scale_m = tl.load(p_scale + first + o_m, mask=m_m, other=1.0)
    b_scale_n = tl.load(p_scale + first + o_n, mask=m_n, other=1.0)
    b_dot = tl.zeros([BT, BT], dtype=tl.float32)
    for i_d in range(0, D, CHUNK):
        o_d = tl.cast(i_d, tl.int64) * stride_xd
        b_dot += dot_tile(
            p_m + o_d,
            m_m,
            b_scale_m,
            stride_xd,
            p_n + o_d,
            m_n,
            b_scale_n,
            stride_xd,
            tl.minimum(D - i_d, CHUNK),
            SCALED,
            BT,
            BT,
            BD,
            PRECISION,
        )

    # Each factor commutes, so (i, j) and (j, i) round alike
    b_inv_m = tl.load(p_inv + first + o_m, mask=m_m, other=0.0)
    b_inv_n = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
    b_r_m = finite_relevance(tl.load(p_relevance + first + o_m, mask=m_m, other=0.0))
    b_r_n = finite_relevance(tl.load(p_relevance + first + o_n, mask=m_n, other=0.0))
    b_k = cosine_tile(b_dot, b_inv_m, b_inv_n) * (b_r_m[:, None] * b_r_n[None, :])
    b_diag = tl.where(b_inv_m > 0.0, b_r_m * b_r_m, 0.0)
    b_k = tl.where(o_m[:, None] == o_n[None, :], b_diag[:, None], b_k)
    m_k = m_m[:, None] & m_n[None, :]
    p_upper = p_k + o_m[:, None].to(tl.int64) * stride_kn + o_n[None, :]  # [BT, BT]
    tl.store(p_upper, b_k, mask=m_k & (o_m[:, None] <= o_n[None, :]))
    p_lower = p_k + o_n[:, None].to(tl.int64) * stride_kn + o_m[None, :]  # [BT, BT]
    m_k = m_n[:, None] & m_m[None, :]
    tl.store(p_lower, tl.trans(b_k), mask=m_k & (o_m[None, :] < o_n[:, None]))


def launch_kernel_matrix(
    tokens: torch.Tensor,
    relevance: torch.Tensor,
    inv_norm: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    width: int = 0,
    clear: torch.Tensor | None = None,
) -> torch.Tensor:
    """L of (B, N, D) tokens and (B, N) fp32 relevance: (B, N, N) fp32, in one launch (two without the statistics).

    `inv_norm` and `scale` come from `launch_token_pass` on these tokens. With `cu_seqlens` (S + 1,) int32, tokens are
    packed (T, D), relevance is (T,) and the result (T, width); a segment longer than `width` is left out, and entries
    past a segment's length are not written. `clear` is an int64 buffer that the same launch sets to zero.
    """
    if inv_norm is None or scale is None:
        inv_norm, scale, _, _ = launch_token_pass(tokens, cu_seqlens=cu_seqlens)
    segments, n, strides = dense_layout(tokens, cu_seqlens)
    relevance = relevance.contiguous()
    tile = TILES[tokens.dtype]
    varlen = cu_seqlens is not None
    slots, total = slot_count(segments, n, tile["BT"], varlen)
    if varlen:
        out = torch.empty((n, width), dtype=torch.float32, device=tokens.device)
    else:
        width = n
        out = torch.empty((segments, n, n), dtype=torch.float32, device=tokens.device)
    fan = triton.cdiv(width, tile["BT"])
    if total * fan == 0:
        return out
    with device_guard(tokens):
        kernel_matrix_kernel[(total, fan)](
            tokens,
            relevance,
            inv_norm,
            scale,
            out,
            inv_norm if cu_seqlens is None else cu_seqlens,
            inv_norm if clear is None else clear,
            0 if clear is None else clear.numel(),
            *strides,
            n * n,
            width,
            segments,
            n,
            tokens.shape[-1],
            slots,
            VARLEN=varlen,
            SCALED=tokens.dtype != torch.float16,
            PRECISION="ieee",
            CHUNK=CHUNK,
            BCLEAR=CLEAR_BLOCK,
            **tile,
            **register_limit(tokens.device, REGISTERS),
        )
    return out


def _table_entry(dtype: torch.dtype, varlen: bool) -> None:
    """A launch of one variant, on any device."""
    shape = (2048,) if varlen else (2, 1024)
    row = torch.empty(shape, dtype=torch.float32, device="meta")
    tokens = torch.empty((*shape, 4096), dtype=dtype, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta") if varlen else None
    clear = torch.empty(4096, dtype=torch.int64, device="meta")
    launch_kernel_matrix(tokens, row, row, row, cu_seqlens=cu_seqlens, width=1024, clear=clear)


LAUNCH_TABLE = tuple(
    (f"{str(dtype)[6:]}{' packed' if varlen else ''}", partial(_table_entry, dtype, varlen))
    for dtype in TILES
    for varlen in (False, True)
)
