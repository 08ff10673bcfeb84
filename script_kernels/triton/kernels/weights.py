"""What a ranking from tokens starts from, by tensor operations on one number per token: weights, residuals, units.

Small next to the launches that follow, in float64, where powers of a relevance and norms are moderate as logarithms.
"""

import torch

from script_kernels.options import QcspOptions

from .layout import Layout
from .rows import Rows

FAR = 30  # exponents up to which squares are well inside fp32


def usable(relevance: torch.Tensor | None, layout: Layout, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance (B, N) float64, 1 without one and 0 for a bad token, and which tokens are good, (B, N) bool."""
    good = rows.inv_norm.view(layout.segments, layout.n) >= 0
    if relevance is None:
        return good.double(), good
    good = good & torch.isfinite(relevance)
    return torch.where(good, relevance.double(), 0.0), good


def unit_of(logarithm: torch.Tensor) -> torch.Tensor:
    """Exponents (B, 1) that bring the largest of 2^logarithm (B, N) near 1; 0 where it is not far from it."""
    largest = logarithm.amax(1, keepdim=True).trunc()
    return torch.where(torch.isfinite(largest) & (largest.abs() > FAR), largest, 0.0)


def scaled_back(gains: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """gains * 2^exponent (B, 1), at most the largest float32."""
    wide = torch.where(gains > 0, gains.double() * torch.exp2(exponent), 0.0)
    return wide.clamp(max=torch.finfo(torch.float32).max).float()


def kernel_weights(
    relevance: torch.Tensor, layout: Layout, rows: Rows, options: QcspOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (B, N) of cosines in the kernel of `qcsp`, its diagonal, NaN for bad tokens, and how gains are scaled.

    Both in units of the power of two whose exponent comes last.
    """
    r, good = usable(relevance, layout, rows)
    norm = rows.inv_norm.view_as(r)
    logarithm = options.power * r.abs().log2() if options.power else torch.zeros_like(r)
    if not options.normalize:
        logarithm = logarithm - (norm.double() * rows.scale.view_as(r)).log2()
    logarithm = torch.where(good & (norm > 0), logarithm, -torch.inf)
    ridge = torch.full_like(logarithm[:, :1], options.ridge)
    exponent = unit_of(torch.cat([logarithm, ridge.log2() / 2], 1))
    weight = torch.exp2(logarithm - exponent).float()
    diagonal = weight * weight + (ridge * torch.exp2(-2 * exponent)).float()
    return weight, torch.where(good, diagonal, torch.nan), 2 * exponent


def max_min_weights(
    relevance: torch.Tensor | None, layout: Layout, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (B, N) fp32 of distances, which tokens are good, and the exponent (B, 1) of their unit."""
    r, good = usable(relevance, layout, rows)
    r = r.clamp(min=0)
    exponent = unit_of(r.log2())
    return (r * torch.exp2(-exponent)).float(), good, exponent


def mmr_weights(
    relevance: torch.Tensor, balance: float, layout: Layout, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start (NaN for bad tokens), offset and slope (B, N) fp32 of residuals, their exponent and what they count from.

    Residuals are not negative: they count from the score of a least relevant token that equals a pick.
    """
    r, good = usable(relevance, layout, rows)
    low = torch.where(good, r, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)
    above = torch.where(good, balance * (r - low), 0.0)
    reach = above.amax(1, keepdim=True).log2().trunc()
    exponent = torch.where(reach > 2 * FAR, reach, 0.0)
    unit = torch.exp2(-exponent)
    start = torch.where(good, (above * unit).float(), torch.nan)
    offset = ((above + (1 - balance)) * unit).float()
    return start, offset, ((1 - balance) * unit).float().expand_as(offset).contiguous(), exponent, balance * low
