"""What a ranking from tokens starts from, made of one number per token: weights, residuals, and the unit of its gains.

One launch, a program per image, in float64: there powers of a relevance and norms are moderate as logarithms. Weights
leave it in fp32, in units of a power of two that brings the largest near 1, and gains are led back by the greedy steps
themselves: they take from here, per image, what a gain is multiplied with and what is added to the first and to others.
"""

import math

import torch
import triton
import triton.language as tl

from script_kernels.options import QcspOptions

from .layout import Layout, double_bits, launch
from .rows import Rows

FAR = tl.constexpr(30)  # exponents up to which squares are well inside fp32
BLOCK_WEIGHTS, WEIGHT_WARPS = 1024, 8


@triton.jit
def bits_to_double(bits):
    """A double that travelled as an integer: arguments that are floats arrive in fp32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(value):
    """Of a float64 that is not negative, the power of two at or below it; of 0 and denormals -1023."""
    return ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64, of an int64 within the range of its exponents."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def usable(p_relevance, p_inv, o_flat, m_n):
    """Relevance in float64, 1 without one and 0 for a bad token, and which tokens are good."""
    m_good = m_n & (tl.load(p_inv + o_flat, mask=m_n, other=-1.0) >= 0.0)
    if p_relevance is not None:
        b_relevance = tl.load(p_relevance + o_flat, mask=m_n, other=0.0)
        m_good = m_good & (tl.abs(b_relevance) < float("inf"))
        b_r = tl.where(m_good, b_relevance, 0.0).to(tl.float64)
    else:
        b_r = tl.where(m_good, 1.0, 0.0).to(tl.float64)
    return b_r, m_good


@triton.jit
def store_unit(p_unit, unit, first, others):
    """What becomes of gains: see `greedy_kernel`."""
    p_image = p_unit + 3 * tl.program_id(0)
    tl.store(p_image, unit)
    tl.store(p_image + 1, first)
    tl.store(p_image + 2, others)


@triton.jit(do_not_specialize=["N", "power_bits", "ridge_bits"])
def kernel_weights_kernel(
    p_relevance,
    p_inv,
    p_scale,
    p_logarithm,  # fp64, one per token, scratch
    p_weight,
    p_start,
    p_unit,  # fp64 [B, 3]
    N,
    power_bits,
    ridge_bits,  # of half the ridge's logarithm
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights (relevance^power, over the norm unless normalised) of cosines, and the diagonal: NaN for bad tokens."""
    first = tl.program_id(0).to(tl.int64) * N
    power = bits_to_double(power_bits)
    half_ridge = bits_to_double(ridge_bits)
    largest = half_ridge
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_r, m_good = usable(p_relevance, p_inv, first + o_n, m_n)
        b_inv = tl.load(p_inv + first + o_n, mask=m_n, other=0.0)
        b_r = tl.where(power == 0.0, 1.0, tl.abs(b_r))
        m_some = m_good & (b_inv > 0.0) & (b_r > 0.0)
        b_log = power * tl.log2(tl.where(m_some, b_r, 1.0))
        if not NORMALIZE:
            b_norm = b_inv.to(tl.float64) * tl.load(p_scale + first + o_n, mask=m_n, other=1.0).to(tl.float64)
            b_log -= tl.log2(tl.where(m_some, b_norm, 1.0))
        b_log = tl.where(m_some, b_log, -float("inf"))
        tl.store(p_logarithm + first + o_n, b_log, mask=m_n)
        largest = tl.maximum(largest, tl.max(b_log, axis=0))
    tl.debug_barrier()
    largest = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    exponent = largest.to(tl.int64).to(tl.float64)
    exponent = tl.where(tl.abs(exponent) > FAR, exponent, 0.0)
    ridge = tl.exp2(2.0 * (half_ridge - exponent)).to(tl.float32)
    store_unit(p_unit, tl.exp2(2.0 * exponent), 0.0, 0.0)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < N
        _, m_good = usable(p_relevance, p_inv, first + o_n, m_n)
        b_log = tl.load(p_logarithm + first + o_n, mask=m_n, other=-float("inf"))
        b_weight = tl.exp2(b_log - exponent).to(tl.float32)
        tl.store(p_weight + first + o_n, b_weight, mask=m_n)
        b_start = tl.where(m_good, b_weight * b_weight + ridge, float("nan"))
        tl.store(p_start + first + o_n, b_start, mask=m_n)


@triton.jit(do_not_specialize=["N"])
def max_min_weights_kernel(
    p_relevance,  # or None
    p_inv,
    p_weight,
    p_ones,
    p_unit,  # fp64 [B, 3]
    N,
    BLOCK: tl.constexpr,
):
    """Weights of distances, which are relevances and not negative: NaN for bad tokens."""
    first = tl.program_id(0).to(tl.int64) * N
    largest = tl.full([], 0.0, tl.float64)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        b_r, _ = usable(p_relevance, p_inv, first + o_n, o_n < N)
        largest = tl.maximum(largest, tl.max(b_r, axis=0))
    exponent = exponent_of(largest)
    exponent = tl.where((largest > 0.0) & (tl.abs(exponent) > FAR), exponent, 0)
    store_unit(p_unit, power_of_two(exponent), 0.0, 0.0)
    inverse = power_of_two(-exponent)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_r, m_good = usable(p_relevance, p_inv, first + o_n, m_n)
        b_weight = (tl.maximum(b_r, 0.0) * inverse).to(tl.float32)
        tl.store(p_weight + first + o_n, tl.where(m_good, b_weight, float("nan")), mask=m_n)
        tl.store(p_ones + first + o_n, tl.full([BLOCK], 1.0, tl.float32), mask=m_n)


@triton.jit(do_not_specialize=["N", "balance_bits"])
def mmr_weights_kernel(
    p_relevance,
    p_inv,
    p_start,
    p_offset,
    p_slope,
    p_ones,
    p_unit,  # fp64 [B, 3]
    N,
    balance_bits,
    BLOCK: tl.constexpr,
):
    """Start (NaN for bad tokens), offset and slope of residuals.

    These are not negative: they count from the score of a least relevant token that equals a pick.
    """
    first = tl.program_id(0).to(tl.int64) * N
    balance = bits_to_double(balance_bits)
    low = tl.full([], float("inf"), tl.float64)
    high = tl.full([], -float("inf"), tl.float64)
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        b_r, m_good = usable(p_relevance, p_inv, first + o_n, o_n < N)
        low = tl.minimum(low, tl.min(tl.where(m_good, b_r, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(m_good, b_r, -float("inf")), axis=0))
    low = tl.where(low <= high, low, 0.0)
    high = tl.where(low <= high, high, 0.0)
    exponent = exponent_of(balance * (high - low))
    exponent = tl.where(exponent > 2 * FAR, exponent, 0)
    inverse = power_of_two(-exponent)
    store_unit(p_unit, power_of_two(exponent), balance * low, balance * low - (1.0 - balance))
    for i_n in range(0, N, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_r, m_good = usable(p_relevance, p_inv, first + o_n, m_n)
        b_above = tl.where(m_good, balance * (b_r - low), 0.0)
        b_start = tl.where(m_good, (b_above * inverse).to(tl.float32), float("nan"))
        tl.store(p_start + first + o_n, b_start, mask=m_n)
        tl.store(p_offset + first + o_n, ((b_above + (1.0 - balance)) * inverse).to(tl.float32), mask=m_n)
        b_slope = tl.zeros([BLOCK], tl.float64) + (1.0 - balance) * inverse
        tl.store(p_slope + first + o_n, b_slope.to(tl.float32), mask=m_n)
        tl.store(p_ones + first + o_n, tl.full([BLOCK], 1.0, tl.float32), mask=m_n)


def room(layout: Layout, rows: Rows, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`count` arrays of one fp32 per token, and the unit (B, 3) float64."""
    unit = torch.empty((layout.segments, 3), dtype=torch.float64, device=rows.inv_norm.device)
    return [torch.empty_like(rows.inv_norm) for _ in range(count)], unit


def kernel_weights(
    relevance: torch.Tensor, layout: Layout, rows: Rows, options: QcspOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (rows,) fp32 of cosines in the kernel of `qcsp`, its diagonal, NaN for bad tokens, and the unit."""
    (weight, start), unit = room(layout, rows, 2)
    half_ridge = math.log2(options.ridge) / 2 if options.ridge else -math.inf
    if layout.rows:
        launch(
            kernel_weights_kernel,
            layout.segments,
            relevance.contiguous(),
            rows.inv_norm,
            rows.scale,
            torch.empty_like(weight, dtype=torch.float64),
            weight,
            start,
            unit,
            layout.n,
            double_bits(options.power),
            double_bits(half_ridge),
            NORMALIZE=options.normalize,
            BLOCK=BLOCK_WEIGHTS,
            num_warps=WEIGHT_WARPS,
        )
    return weight, start, unit


def max_min_weights(
    relevance: torch.Tensor | None, layout: Layout, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (rows,) fp32 of distances, NaN for bad tokens; ones; and the unit."""
    (weight, ones), unit = room(layout, rows, 2)
    if layout.rows:
        given = None if relevance is None else relevance.contiguous()
        arguments = (given, rows.inv_norm, weight, ones, unit, layout.n)
        launch(max_min_weights_kernel, layout.segments, *arguments, BLOCK=BLOCK_WEIGHTS, num_warps=WEIGHT_WARPS)
    return weight, ones, unit


def mmr_weights(
    relevance: torch.Tensor, balance: float, layout: Layout, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start (NaN for bad tokens), offset and slope (rows,) fp32 of residuals; ones; and the unit."""
    (start, offset, slope, ones), unit = room(layout, rows, 4)
    if layout.rows:
        arguments = (relevance.contiguous(), rows.inv_norm, start, offset, slope, ones, unit)
        sizes = (layout.n, double_bits(balance))
        launch(mmr_weights_kernel, layout.segments, *arguments, *sizes, BLOCK=BLOCK_WEIGHTS, num_warps=WEIGHT_WARPS)
    return start, offset, slope, ones, unit
