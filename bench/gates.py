"""No number without a right result: one check per op, on the inputs that are then timed, raising AssertionError."""

import math

import torch
from torch import Tensor

import script_kernels
from script_kernels import reference, testing

THRESHOLD, GAMMA, MIN_DEGREE = 0.2, 1.0, 4
# A cosine accumulated in float32 differs from the exact one by less than this at the widths measured here.
COSINE_ERROR = 5e-6


def query_relevance(tokens: Tensor, query: Tensor) -> None:
    exact = reference.cosine(tokens, query.expand(tokens.shape[0], -1, -1), torch.float64).mean(-1)
    spread = (exact.amax(-1) - exact.amin(-1)).amin().item()  # the min-max divides the cosines' error by it
    expected = reference.query_relevance(tokens, query, dtype=torch.float64)
    error = (script_kernels.query_relevance(tokens, query) - expected).abs().max().item()
    assert error <= 2 * COSINE_ERROR / spread, f"relevance is off by {error:.3g}"


def bipartite_match(tokens: Tensor) -> None:
    best, match, degree, mean, density = script_kernels.bipartite_match(tokens)
    exact = reference.cosine(tokens[:, 0::2], tokens[:, 1::2], torch.float64)
    chosen = exact.gather(2, (match // 2)[:, :, None]).squeeze(2)
    surely = (exact >= THRESHOLD + COSINE_ERROR).sum(-1)
    possibly = (exact >= THRESHOLD - COSINE_ERROR).sum(-1)
    assert bool((match % 2 == 1).all()), "a match is not a destination"
    assert (best - exact.amax(-1)).abs().max() <= COSINE_ERROR, "best is off"
    assert (chosen - exact.amax(-1)).abs().max() <= COSINE_ERROR, "a match is not the best destination"
    assert bool(((degree >= surely) & (degree <= possibly)).all()), "a degree is off"
    assert (density - exact.mean(-1)).abs().max() <= COSINE_ERROR, "density is off"
    sure = surely == possibly
    expected = (exact * (exact >= THRESHOLD)).sum(-1) / surely.clamp(min=1)
    assert (mean - expected)[sure].abs().max() <= COSINE_ERROR, "mean is off"


def gsp(tokens: Tensor, keep: int) -> None:
    """The scores against float64, and the mask against the scores, exactly."""
    mask, redundancy = script_kernels.gsp(tokens, keep)
    count = tokens.shape[1]
    exact = reference.cosine(tokens[:, 0::2], tokens[:, 1::2], torch.float64)
    near = exact >= THRESHOLD
    degree = near.sum(-1)
    rho = degree * torch.exp(GAMMA * ((exact * near).sum(-1) / degree.clamp(min=1) - THRESHOLD))
    rho = torch.where(degree >= MIN_DEGREE, rho, rho / 2 + exact.mean(-1) / 2)
    # Where a similarity is within rounding of the threshold, either decision is right: such a score is not compared.
    sure = ((exact - THRESHOLD).abs() > COSINE_ERROR).all(-1)
    assert sure.double().mean() > 0.2, "too few scores can be compared"
    error = ((redundancy[:, 0::2] - rho).abs() / (1 + rho))[sure].max().item()
    assert error <= 4 * COSINE_ERROR, f"redundancy is off by {error:.3g} of its size"
    assert not redundancy[:, 1::2].any(), "a destination has a score"

    # Dropped are the most redundant, between equals the higher index first: the end of a stable ascending sort.
    dropped = redundancy[:, 0::2].sort(dim=-1, stable=True).indices[:, keep - count // 2 :] * 2
    expected = torch.ones_like(mask).scatter(1, dropped, False)
    assert torch.equal(mask, expected), "the mask does not drop the most redundant tokens"


def dpp_map(kernel: Tensor, k: int) -> None:
    testing.certify(testing.kernel64_of(kernel), script_kernels.dpp_map(kernel, k)[0])


def qcsp(tokens: Tensor, relevance: Tensor, k: int) -> None:
    testing.certify(testing.kernel64(tokens, relevance), script_kernels.qcsp(tokens, relevance, k)[0])


def max_min(tokens: Tensor, relevance: Tensor, k: int) -> None:
    testing.certify_max_min(tokens, relevance, script_kernels.max_min(tokens, relevance, k)[0])


def mmr(tokens: Tensor, relevance: Tensor, k: int) -> None:
    testing.certify_mmr(tokens, relevance, script_kernels.mmr(tokens, relevance, k)[0])


def mask_intersect(ranking: Tensor, mask: Tensor, k: int) -> None:
    result = script_kernels.mask_intersect(ranking, mask, k)
    for row, kept, got in zip(ranking.tolist(), mask.tolist(), result.tolist(), strict=True):
        inside = [index for index in row if kept[index]]
        expected = sorted((inside + [index for index in row if not kept[index]])[:k])
        assert got == expected, "the intersection is wrong"


def prune(tokens: Tensor, query: Tensor | None, keep: int) -> None:
    """Equal to its stages put together, each of them checked."""
    count = tokens.shape[1]
    ranks, survivors = min(count, 2 * keep), count - math.floor(0.25 * count)
    if query is None:
        relevance = torch.ones(tokens.shape[:2], device=tokens.device)
    else:
        query_relevance(tokens, query)
        relevance = script_kernels.query_relevance(tokens, query)
    ranking, _ = script_kernels.qcsp(tokens, relevance, ranks)
    testing.certify(testing.kernel64(tokens, relevance), ranking)
    gsp(tokens, survivors)
    mask, _ = script_kernels.gsp(tokens, survivors)
    expected = reference.mask_intersect(ranking, mask, keep)
    assert torch.equal(script_kernels.prune(tokens, query, keep), expected), "prune differs from its stages"


def prune_varlen(tokens: Tensor, cu_seqlens: Tensor, query: Tensor | None, keep: list[int]) -> None:
    starts = cu_seqlens.tolist()
    parts = [
        script_kernels.prune(tokens[None, start:end], query, count)[0] + start
        for start, end, count in zip(starts, starts[1:], keep, strict=False)
    ]
    assert torch.equal(script_kernels.prune_varlen(tokens, cu_seqlens, query, keep), torch.cat(parts)), (
        "a segment's result differs from prune on it alone"
    )
