"""prune_varlen: `prune` of packed segments, in the launches of a dense batch and one more per 32 segments.

The extra launch puts the counts of `keep`, which are host integers, on the device. They travel as kernel arguments: a
copy from pageable memory would synchronise, and a CUDA graph would not keep it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gsp import double_bits
from .prune import prune_segments
from .tokens import device_guard

PLACED = 32  # counts per launch


@triton.jit(do_not_specialize=["S", "i_from", "most", *(f"k{i}" for i in range(32)), "oversample_bits"])
def place_kernel(
    p_counts,  # (S,) int32
    p_limits,  # (S,) int32: ceil(oversample * keep)
    i_from,
    S,
    most,
    oversample_bits,
    k0,
    k1,
    k2,
    k3,
    k4,
    k5,
    k6,
    k7,
    k8,
    k9,
    k10,
    k11,
    k12,
    k13,
    k14,
    k15,
    k16,
    k17,
    k18,
    k19,
    k20,
    k21,
    k22,
    k23,
    k24,
    k25,
    k26,
    k27,
    k28,
    k29,
    k30,
    k31,
    BLOCK: tl.constexpr,
):
    """Writes up to 32 counts and the lengths of their rankings."""
    o_s = tl.arange(0, BLOCK)
    b_keep = tl.zeros([BLOCK], dtype=tl.int32)
    b_keep = tl.where(o_s == 0, k0, b_keep)
    b_keep = tl.where(o_s == 1, k1, b_keep)
    b_keep = tl.where(o_s == 2, k2, b_keep)
    b_keep = tl.where(o_s == 3, k3, b_keep)
    b_keep = tl.where(o_s == 4, k4, b_keep)
    b_keep = tl.where(o_s == 5, k5, b_keep)
    b_keep = tl.where(o_s == 6, k6, b_keep)
    b_keep = tl.where(o_s == 7, k7, b_keep)
    b_keep = tl.where(o_s == 8, k8, b_keep)
    b_keep = tl.where(o_s == 9, k9, b_keep)
    b_keep = tl.where(o_s == 10, k10, b_keep)
    b_keep = tl.where(o_s == 11, k11, b_keep)
    b_keep = tl.where(o_s == 12, k12, b_keep)
    b_keep = tl.where(o_s == 13, k13, b_keep)
    b_keep = tl.where(o_s == 14, k14, b_keep)
    b_keep = tl.where(o_s == 15, k15, b_keep)
    b_keep = tl.where(o_s == 16, k16, b_keep)
    b_keep = tl.where(o_s == 17, k17, b_keep)
    b_keep = tl.where(o_s == 18, k18, b_keep)
    b_keep = tl.where(o_s == 19, k19, b_keep)
    b_keep = tl.where(o_s == 20, k20, b_keep)
    b_keep = tl.where(o_s == 21, k21, b_keep)
    b_keep = tl.where(o_s == 22, k22, b_keep)
    b_keep = tl.where(o_s == 23, k23, b_keep)
    b_keep = tl.where(o_s == 24, k24, b_keep)
    b_keep = tl.where(o_s == 25, k25, b_keep)
    b_keep = tl.where(o_s == 26, k26, b_keep)
    b_keep = tl.where(o_s == 27, k27, b_keep)
    b_keep = tl.where(o_s == 28, k28, b_keep)
    b_keep = tl.where(o_s == 29, k29, b_keep)
    b_keep = tl.where(o_s == 30, k30, b_keep)
    b_keep = tl.where(o_s == 31, k31, b_keep)
    share = oversample_bits.to(tl.int64).to(tl.float64, bitcast=True)
    b_limit = tl.minimum(tl.ceil(b_keep.to(tl.float64) * share), most.to(tl.float64)).to(tl.int32)
    m_s = i_from + o_s < S
    tl.store(p_counts + i_from + o_s, b_keep, mask=m_s)
    tl.store(p_limits + i_from + o_s, b_limit, mask=m_s)


def place_counts(keep: Sequence[int], oversample: float, most: int, device: torch.device) -> list[torch.Tensor]:
    """`keep` and min(most, ceil(oversample * keep)) as int32 tensors, without a copy from the host."""
    placed = [torch.empty(len(keep), dtype=torch.int32, device=device) for _ in range(2)]
    with device_guard(placed[0]):
        for start in range(0, len(keep), PLACED):
            some = list(keep[start : start + PLACED])
            some += [0] * (PLACED - len(some))
            place_kernel[(1,)](
                *placed, start, len(keep), most, double_bits(oversample), *some, BLOCK=PLACED, num_warps=1
            )
    return placed


def launch_prune_varlen(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    query: torch.Tensor | None,
    keep: Sequence[int],
    aligned: torch.Tensor | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
) -> torch.Tensor:
    """Indices (sum(keep),) int64 into the packed tokens (T, D), ascending within each segment."""
    if sum(keep) == 0:
        return torch.empty(0, dtype=torch.int64, device=tokens.device)
    cu_seqlens = cu_seqlens.contiguous()
    counts, limits = place_counts(keep, oversample, tokens.shape[0], tokens.device)
    return prune_segments(
        tokens,
        query,
        keep,
        aligned=aligned,
        query_mask=None,
        negate=negate,
        gsp_drop=gsp_drop,
        oversample=oversample,
        combine=combine,
        threshold=threshold,
        gamma=gamma,
        min_degree=min_degree,
        rounds=rounds,
        cu_seqlens=cu_seqlens,
        counts=counts,
        limits=limits,
    )


def _example(dtype: torch.dtype, rounds: int) -> torch.Tensor:
    tokens = torch.empty(2880, 4096, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(6, dtype=torch.int32, device="meta")
    query = torch.empty(1, 20, 4096, dtype=dtype, device="meta")
    return launch_prune_varlen(tokens, cu_seqlens, query, [32] * 5, rounds=rounds)


LAUNCH_TABLE = (
    ("bf16", lambda: _example(torch.bfloat16, 1)),
    ("fp32 2 rounds", lambda: _example(torch.float32, 2)),
)
