"""Eager PyTorch oracle of every op, written to be read.

Each function has the name, arguments and returns of the op it describes, and ``dtype``: the floating type that its
mathematics runs in (float64 for an oracle). All work on any device, on inputs rounded as the ops get them.

The mathematics follows *Script* (arXiv 2512.01949), CDPruner (arXiv 2506.10967) and the fast greedy MAP of Chen et al.
2018.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6  # the rank is exhausted when the best residual falls to this share of the largest L_ii


# --- rows and cosines


def bad_rows(x: Tensor) -> Tensor:
    """(..., N, D) -> (..., N) bool: rows that hold a NaN or an Inf. Such a row counts as a zero row."""
    return ~torch.isfinite(x).all(-1)


def unit_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x (..., N, D) divided by their norms; zero and bad rows become zeros.

    Norms are taken in float64, where the squares of the largest float32 and of the smallest denormal are ordinary
    numbers.
    """
    x = x.double().masked_fill(bad_rows(x)[..., None], 0.0)
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, 0.0).to(dtype)


def first_equal(x: Tensor) -> Tensor:
    """(B, N, D) -> (B, N) int64: for each row, the index of the first row of the same image that is equal to it.

    A matrix product may round equal rows differently, depending on where they stand in its tiles. Results are therefore
    taken from the first of the equal rows, which makes exact duplicates tie exactly.
    """
    B, N, _ = x.shape
    first = torch.empty(B, N, dtype=torch.int64, device=x.device)
    for b in range(B):
        group = torch.unique(x[b], dim=0, return_inverse=True)[1]
        position = torch.arange(N, device=x.device)
        first[b] = torch.full_like(position, N).scatter_reduce(0, group, position, "amin")[group]
    return first


def cosine(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines (B, N, M) of the rows of x (B, N, D) with the rows of y (B, M, D); 0 where a row is zero or bad."""
    x, y = unit_rows(x, dtype), unit_rows(y, dtype)
    s = x @ y.mT
    s = s.gather(1, first_equal(x)[:, :, None].expand_as(s))
    return s.gather(2, first_equal(y)[:, None, :].expand_as(s))


def kernel_matrix(tokens: Tensor, relevance: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The conditional kernel L = diag(r) S diag(r), (B, N, N), of tokens (B, N, D) and relevance (B, N).

    The diagonal is r_i^2 exactly, 0 for zero rows. A bad row, or a relevance that is not finite, gives a zero row and
    column.
    """
    x = unit_rows(tokens, dtype)
    r = torch.where(torch.isfinite(relevance), relevance.to(dtype), 0.0)
    s = x @ x.mT
    s.diagonal(dim1=1, dim2=2).copy_((x != 0).any(-1))
    first = first_equal(x)
    s = s.gather(1, first[:, :, None].expand_as(s)).gather(2, first[:, None, :].expand_as(s))
    return s * (r[:, :, None] * r[:, None, :])


# --- relevance


@torch.no_grad()
def query_relevance(
    tokens: Tensor,
    query: Tensor,
    query_mask: Tensor | None = None,
    *,
    negate: bool = False,
    reduce: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """r_i = minmax_i(mean_q or max_q cos(a_i, q)): (B, N, C), (B or 1, Q, C), (B or 1, Q) -> (B, N) in [0, 1]."""
    B, N, _ = tokens.shape
    similarity = cosine(tokens, query.expand(B, -1, -1), dtype)  # (B, N, Q)
    if query_mask is None:
        query_mask = torch.ones(1, query.shape[1], dtype=torch.bool, device=query.device)
    unmasked = query_mask.expand(B, -1)
    if reduce == "max":
        score = similarity.masked_fill(~unmasked[:, None, :], -math.inf).amax(-1)
        score = score.masked_fill(~unmasked.any(-1, keepdim=True), 0.0)
    else:
        score = similarity.masked_fill(~unmasked[:, None, :], 0.0).sum(-1) / unmasked.sum(-1, keepdim=True).clamp(min=1)
    if negate:
        score = -score
    bad = bad_rows(tokens)
    if N == 0:
        return score
    low = score.masked_fill(bad, math.inf).amin(-1, keepdim=True)
    high = score.masked_fill(bad, -math.inf).amax(-1, keepdim=True)
    constant = high - low <= 1e-6
    relevance = torch.where(constant, 1.0, (score - low) / torch.where(constant, 1.0, high - low))
    return relevance.masked_fill(bad, 0.0)


# --- graph-structured pruning


@torch.no_grad()
def bipartite_match(
    tokens: Tensor, threshold: float = 0.2, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compares every source (even position) of tokens (B, N, D) with every destination (odd position).

    Returns best, match, degree, mean, density, each (B, ceil(N/2)).
    """
    similarity = cosine(tokens[:, 0::2], tokens[:, 1::2], dtype)  # (B, ceil(N/2), floor(N/2))
    if similarity.shape[2] == 0:
        zero = similarity.new_zeros(similarity.shape[:2])
        return zero, torch.full_like(zero, -1, dtype=torch.int32), zero.to(torch.int32), zero.clone(), zero.clone()
    destination = similarity.argmax(-1, keepdim=True)  # the first of equal maxima
    near = similarity >= threshold
    degree = near.sum(-1)
    return (
        similarity.gather(-1, destination).squeeze(-1),
        (2 * destination.squeeze(-1) + 1).to(torch.int32),
        degree.to(torch.int32),
        similarity.masked_fill(~near, 0.0).sum(-1) / degree.clamp(min=1),
        similarity.mean(-1),
    )


def redundancy_score(
    degree: Tensor, mean: Tensor, density: Tensor, threshold: float, gamma: float, min_degree: int
) -> Tensor:
    """rho = degree * exp(gamma * (mean - threshold)); below min_degree, half of that plus half the density."""
    rho = torch.where(degree > 0, degree * torch.exp(gamma * (mean - threshold)), 0.0)
    return torch.where(degree >= min_degree, rho, 0.5 * rho + 0.5 * density)


def gsp_quotas(n: int, keep: int, rounds: int) -> list[int] | None:
    """How many tokens each round drops, or None where a round would have to drop more than its sources."""
    quotas = []
    for done in range(rounds):
        quota = math.ceil((n - keep) / (rounds - done))
        if quota > math.ceil(n / 2) or quota >= n > 0:
            return None
        quotas.append(quota)
        n -= quota
    return quotas


@torch.no_grad()
def gsp(
    tokens: Tensor,
    keep: int,
    *,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Drops the most redundant sources until ``keep`` of N tokens are left: mask (B, N) bool and redundancy (B, N)."""
    B, N, D = tokens.shape
    quotas = gsp_quotas(N, keep, rounds)
    if quotas is None:
        enough = next(r for r in range(rounds, N + 1) if gsp_quotas(N, keep, r) is not None)
        raise ValueError(
            f"keep: {keep} of N = {N} tokens cannot be reached with rounds = {rounds} (a round drops at most half); "
            f"needs rounds >= {enough}"
        )
    mask = torch.ones(B, N, dtype=torch.bool, device=tokens.device)
    redundancy = torch.zeros(B, N, dtype=dtype, device=tokens.device)
    left = N
    for quota in quotas:
        survivors = mask.nonzero()[:, 1].view(B, left)
        _, _, degree, mean, density = bipartite_match(
            tokens.gather(1, survivors[:, :, None].expand(-1, -1, D)), threshold, dtype=dtype
        )
        rho = redundancy_score(degree, mean, density, threshold, gamma, min_degree)
        sources = survivors[:, 0::2]
        redundancy.scatter_(1, sources, rho)
        if quota == 0:  # further rounds would score the same split
            break
        # Most redundant first; between equals the higher index first.
        order = rho.flip(1).argsort(dim=1, descending=True, stable=True)
        mask.scatter_(1, sources.flip(1).gather(1, order[:, :quota]), False)
        left -= quota
    return mask, redundancy


# --- query-conditioned selection: greedy MAP of a determinantal point process


def greedy(kernel: Tensor, relevance: Tensor, tier: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Diagonally pivoted Cholesky of kernel (B, N, N), stopped after k pivots.

    Tokens of a lower ``tier`` (B, N), one of 0, 1, 2, are all taken before any of a higher one. Within a tier the pick
    is the token of largest residual variance; once that is at most RANK_TOLERANCE times the largest diagonal entry of
    this and the lower tiers, the tier's other tokens follow by relevance. Between equals the lower index is first.
    """
    B, N, _ = kernel.shape
    diagonal = kernel.diagonal(dim1=1, dim2=2).clamp(min=0)
    residual = diagonal
    fallback = relevance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # a token's place in that order
    first = first_equal(kernel.mT)
    selected = torch.zeros(B, N, dtype=torch.bool, device=kernel.device)
    factor = kernel.new_zeros(B, k, N)  # rows of the Cholesky factor
    indices, gains = [], []

    for t in range(k):
        current = tier.masked_fill(selected, 3).amin(1, keepdim=True)
        candidate = ~selected & (tier == current)
        scale = diagonal.masked_fill(tier > current, 0.0).amax(1, keepdim=True)

        masked = residual.masked_fill(~candidate, -1.0)
        pick = masked.argmax(1, keepdim=True)  # the first of equal maxima
        gain = masked.gather(1, pick)
        exhausted = gain <= RANK_TOLERANCE * scale
        pick = torch.where(exhausted, fallback.masked_fill(~candidate, N).argmin(1, keepdim=True), pick)
        gain = gain.masked_fill(exhausted, 0.0)

        # One row of the factor: (L_j - C_jᵀ C) / sqrt(d_j). Past the rank there is nothing left to condition on.
        row = kernel.gather(1, pick[:, :, None].expand(-1, 1, N)).squeeze(1)
        done = factor[:, :t]
        pivot = done.gather(2, pick[:, None, :].expand(-1, t, 1))
        row = (row - (pivot.mT @ done).squeeze(1)).gather(1, first)
        row = torch.where(exhausted, 0.0, row / torch.where(exhausted, 1.0, gain.sqrt()))
        factor[:, t] = row
        residual = (residual - row * row).clamp(min=0)

        selected.scatter_(1, pick, True)
        indices.append(pick)
        gains.append(gain)
    if not indices:
        return torch.empty(B, 0, dtype=torch.int64, device=kernel.device), kernel.new_empty(B, 0)
    return torch.cat(indices, 1), torch.cat(gains, 1)


@torch.no_grad()
def dpp_map(kernel: Tensor, k: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the DPP with kernel (B, N, N): indices (B, k) in greedy order, gains (B, k).

    A token with a non-finite diagonal entry is a zero row and goes last; other non-finite entries count as 0.
    """
    bad = ~torch.isfinite(kernel.diagonal(dim1=1, dim2=2))
    kernel = torch.where(torch.isfinite(kernel) & ~bad[:, :, None] & ~bad[:, None, :], kernel, 0.0).to(dtype)
    return greedy(kernel, kernel.diagonal(dim1=1, dim2=2), bad.long(), k)


Kernel = tuple[float, bool, float]  # power, normalize and ridge of `qcsp`


def _select(
    tokens: Tensor, relevance: Tensor, tier: Tensor, k: int, dtype: torch.dtype, options: Kernel = (1.0, True, 0.0)
) -> tuple[Tensor, Tensor]:
    """Greedy selection in which bad tokens form a tier of their own behind all others."""
    power, normalize, ridge = options
    bad = bad_rows(tokens) | ~torch.isfinite(relevance)
    relevance = relevance.masked_fill(bad, 0.0)
    # By a power of two, so that no square overflows or vanishes. A zero row has L_ii = 0, whatever its relevance.
    weight = relevance.double().abs() ** power
    if not normalize:
        weight = weight * tokens.double().norm(dim=-1)
    weight = weight.masked_fill(bad | (tokens == 0).all(-1), 0.0)
    exponent = -torch.frexp(weight.amax(1, keepdim=True).clamp(min=ridge**0.5)).exponent
    kernel = kernel_matrix(tokens, torch.ldexp(weight, exponent), dtype=dtype)
    kernel.diagonal(dim1=1, dim2=2).add_(torch.ldexp(torch.full_like(weight, ridge), 2 * exponent).to(dtype))
    indices, gains = greedy(kernel, relevance, tier.masked_fill(bad, 2), k)
    return indices, torch.ldexp(gains.double(), -2 * exponent).clamp(max=torch.finfo(dtype).max).to(dtype)


@torch.no_grad()
def qcsp(
    tokens: Tensor,
    relevance: Tensor,
    k: int,
    *,
    power: float = 1.0,
    normalize: bool = True,
    ridge: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the DPP with kernel diag(p) S diag(p) + ridge I, p = |r|^power: indices and gains (B, k).

    S are the cosines, or without ``normalize`` the products of the rows.
    """
    tier = torch.zeros_like(relevance, dtype=torch.int64)
    return _select(tokens, relevance, tier, k, dtype, (power, normalize, ridge))


def nearest(
    offset: Tensor, slope: Tensor, similarity: Tensor, first: Tensor, bad: Tensor, k: int
) -> tuple[Tensor, ...]:
    """Takes ``first`` (B,), then k - 1 times the largest least offset - slope * similarity to a pick; bad tokens last.

    offset, slope (B, N) of similarity (B, N, N): indices (B, k), and what each pick had left (B, k), 0 for the first.
    """
    left, free = torch.full_like(offset, math.inf), torch.ones_like(bad)
    pick = first[:, None]
    indices, gains = [pick], [torch.zeros_like(offset[:, :1])]
    for _ in range(k - 1):
        free = free.scatter(1, pick, False)
        row = similarity.gather(1, pick[:, :, None].expand(-1, 1, similarity.shape[2])).squeeze(1)
        left = torch.minimum(left, (offset - slope * row).clamp(min=0))
        pick = torch.where(bad, -1.0, left).masked_fill(~free, -2.0).argmax(1, keepdim=True)  # the first of equals
        indices.append(pick)
        gains.append(left.gather(1, pick).masked_fill(bad.gather(1, pick), 0.0))
    return torch.cat(indices, 1)[:, :k], torch.cat(gains, 1)[:, :k]


@torch.no_grad()
def max_min(
    tokens: Tensor, relevance: Tensor | None, k: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Farthest points first by relevance * (1 - cosine): indices and gains (B, k).

    The first pick is the token farthest from its nearest other one.
    """
    B, N, _ = tokens.shape
    r = torch.ones(B, N, device=tokens.device) if relevance is None else relevance
    bad = bad_rows(tokens) | ~torch.isfinite(r)
    r = r.masked_fill(bad, 0.0).clamp(min=0)
    exponent = -torch.frexp(r.amax(1, keepdim=True)).exponent
    weight = torch.ldexp(r, exponent).to(dtype)
    similarity = kernel_matrix(tokens, torch.ones_like(r), dtype=dtype)
    other = ~(torch.eye(N, dtype=torch.bool, device=tokens.device) | bad[:, None, :])
    alone = weight * (1 - similarity.masked_fill(~other, -1.0).amax(-1)).clamp(min=0)
    first = torch.where(bad, -1.0, alone).argmax(1)
    indices, gains = nearest(weight, weight, similarity, first, bad, k)
    gains[:, 0] = alone.gather(1, first[:, None])[:, 0].masked_fill(bad.all(1), 0.0)
    return indices, torch.ldexp(gains.double(), -exponent).clamp(max=torch.finfo(torch.float32).max).to(dtype)


@torch.no_grad()
def mmr(
    tokens: Tensor, relevance: Tensor, k: int, *, balance: float = 0.5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Largest balance * r - (1 - balance) * largest cosine to a pick, 0 without one: indices and gains (B, k)."""
    bad = bad_rows(tokens) | ~torch.isfinite(relevance)
    r = relevance.masked_fill(bad, 0.0).double()
    low = torch.where(bad, math.inf, r).amin(1, keepdim=True).nan_to_num(posinf=0.0)  # residuals are not negative
    first = torch.where(bad, -math.inf, balance * r).argmax(1)
    offset = (balance * (r - low) + (1 - balance)).to(dtype)
    similarity = kernel_matrix(tokens, torch.ones_like(relevance), dtype=dtype)
    indices, gains = nearest(offset, torch.full_like(offset, 1 - balance), similarity, first, bad, k)
    score = gains.double() + balance * low - (1 - balance)
    score[:, 0] = (balance * r.gather(1, first[:, None]))[:, 0]
    score = score.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
    return indices, score.masked_fill(bad.gather(1, indices), 0.0).to(dtype)


# --- joint selection


@torch.no_grad()
def mask_intersect(ranking: Tensor, mask: Tensor, k: int) -> Tensor:
    """The first k of ranking (B, P) that are in mask (B, N), filled up from its rest; (B, k) ascending."""
    kept_first = mask.gather(1, ranking).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return ranking.gather(1, kept_first)[:, :k].sort(dim=1).values


@torch.no_grad()
def prune(
    tokens: Tensor,
    query: Tensor | None,
    keep: int,
    *,
    aligned: Tensor | None = None,
    query_mask: Tensor | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    rounds: int = 1,
    floor: float = 0.0,
    power: float = 1.0,
    reduce: str = "mean",
    split: str = "raster",
    grid_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    **graph: Any,
) -> Tensor:
    """Picks ``keep`` of the N tokens (B, N, D), neither redundant nor beside the query; (B, keep) ascending indices."""
    B, N, _ = tokens.shape
    order = torch.arange(N, device=tokens.device)
    if split == "checker" and grid_width is not None and grid_width % 2 == 0:
        # With the pairs of every odd row swapped, even places are the squares of one colour.
        order = torch.where(order // grid_width % 2 == 1, order + 1 - 2 * (order % 2), order)
    tokens = tokens[:, order]
    bad = bad_rows(tokens)
    if query is None:
        relevance = torch.ones(B, N, dtype=dtype, device=tokens.device).masked_fill(bad, 0.0)
    else:
        space = tokens if aligned is None else aligned[:, order]
        bad = bad | bad_rows(space)
        relevance = query_relevance(space, query, query_mask, negate=negate, reduce=reduce, dtype=dtype)
        relevance = (floor + (1 - floor) * relevance) ** power
    survivors = N - math.floor(gsp_drop * N)
    if combine == "union":
        survivors = (keep + 1) // 2
        rounds = next(r for r in range(rounds, N + 1) if gsp_quotas(N, survivors, r) is not None)
    mask, _ = gsp(tokens, survivors, rounds=rounds, **graph, dtype=dtype)
    if combine == "intersect":
        pool = min(N, math.ceil(oversample * keep))
        ranking, _ = _select(tokens, relevance, bad.long() * 2, pool, dtype)
        kept = mask_intersect(ranking, mask, keep)
    elif combine == "restrict":
        kept, _ = _select(tokens, relevance, torch.where(mask, 0, 1).masked_fill(bad, 2), keep, dtype)
    elif combine == "union":
        ranking, _ = _select(tokens, relevance, bad.long() * 2, keep, dtype)
        first = mask.to(torch.int64) * 2 * N  # GSP's tokens, then the ranking's
        place = torch.arange(keep, 0, -1, device=tokens.device).expand_as(ranking)
        kept = (first + torch.zeros_like(first).scatter(1, ranking, place)).topk(keep).indices
    else:
        raise ValueError(f"combine: expected 'intersect', 'restrict' or 'union', got {combine!r}")
    return order[kept].sort(dim=1).values


@torch.no_grad()
def prune_varlen(
    tokens: Tensor,
    cu_seqlens: Tensor,
    query: Tensor | None,
    keep: list[int],
    *,
    aligned: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``prune`` of each segment of the packed tokens (T, D); (sum(keep),) indices into the packed tokens."""
    kept = [torch.empty(0, dtype=torch.int64, device=tokens.device)]
    for s, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if stop > start:
            asked = None if query is None else query[s % query.shape[0], None]
            space = None if aligned is None else aligned[None, start:stop]
            kept.append(start + prune(tokens[None, start:stop], asked, keep[s], aligned=space, **options)[0])
    return torch.cat(kept)


# --- the authors' released rule


@torch.no_grad()
def released_map(kernel: Tensor, k: int) -> Tensor:
    """The selection rule that the authors' released code comes down to; (B, k) indices in the order taken.

    Its second loop divides by residuals that were already set to -inf, so earlier picks are not projected out of a new
    pick's row: each pick lowers the residuals by the square of its *raw* kernel row, divided by the root of its
    residual plus 1e-6. Once no residual is above zero nothing is updated any more: the rest goes in the order of the
    residuals left.
    """
    residual = kernel.diagonal(dim1=1, dim2=2).clone()
    indices = []
    for _ in range(k):
        best, pick = residual.max(1, keepdim=True)
        column = kernel.gather(2, pick[:, None, :].expand(-1, kernel.shape[1], 1)).squeeze(2)
        update = (column / (best.clamp(min=0).sqrt() + 1e-6)) ** 2
        residual = torch.where(best > 0, residual - update, residual)
        residual.scatter_(1, pick, -math.inf)
        indices.append(pick)
    return torch.cat(indices, 1)


@torch.no_grad()
def released_prune(
    tokens: Tensor,
    relevance: Tensor,
    keep: int,
    *,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The authors' released pipeline, for reproducing published tables; (B, keep) ascending indices.

    Its graph stage keeps the ``keep`` *most* redundant tokens, scored against all others. Its selection has exactly
    ``keep`` members, so "intersect, then fill from the selection" is that selection, whatever the graph stage kept.
    """
    N = tokens.shape[1]
    similarity = cosine(tokens, tokens, dtype)
    others = ~torch.eye(N, dtype=torch.bool, device=tokens.device)
    near = (similarity >= threshold) & others
    degree = near.sum(-1)
    mean = similarity.masked_fill(~near, 0.0).sum(-1) / degree.clamp(min=1)
    density = similarity.masked_fill(~others, 0.0).sum(-1) / max(N - 1, 1)
    rho = redundancy_score(degree, mean, density, threshold, gamma, min_degree)
    most_redundant = rho.argsort(dim=1, descending=True, stable=True)[:, :keep]
    mask = torch.zeros_like(rho, dtype=torch.bool).scatter(1, most_redundant, True)

    ranking = released_map(kernel_matrix(tokens, relevance, dtype=dtype), keep)
    return mask_intersect(ranking, mask, keep)
