"""What people run today, written as well as its form allows: the implementations that the ops are measured against.

The eager functions are vectorised over the batch and take a loop of tensor ops per pick, like the published code of
CDPruner. They know nothing of zero rows, NaN, rank exhaustion or ties. bf16 and fp16 tokens are widened to fp32 first:
anything less is not exact.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Build = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def normalise(tokens: Tensor) -> Tensor:
    tokens = tokens.float()
    return tokens / tokens.norm(dim=-1, keepdim=True)


def kernel_matrix(tokens: Tensor, relevance: Tensor) -> Tensor:
    """L = diag(r) S diag(r), (B, N, N)."""
    unit = normalise(tokens)
    return relevance[:, :, None] * torch.bmm(unit, unit.mT) * relevance[:, None, :]


def greedy_step(kernel: Tensor, rows: Tensor, residual: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pick per image: (pick (B,), its Cholesky row (B, N), residuals after it). rows (t, B, N): those so far."""
    pick = residual.argmax(-1)
    row = kernel[batch, pick] - torch.einsum("tb,tbn->bn", rows[:, batch, pick], rows)
    row = row / residual[batch, pick].sqrt()[:, None]
    residual = (residual - row.square()).scatter(1, pick[:, None], float("-inf"))
    return pick, row, residual


def dpp_map(kernel: Tensor, k: int, step: Step = greedy_step) -> Tensor:
    """Greedy MAP on a ready kernel: (B, k) in the order of the picks."""
    size, count, _ = kernel.shape
    batch = torch.arange(size, device=kernel.device)
    residual = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_empty(k, size, count)
    picks = torch.empty(k, size, dtype=torch.int64, device=kernel.device)
    for t in range(k):
        picks[t], rows[t], residual = step(kernel, rows[:t], residual, batch)
    return picks.T


def qcsp(tokens: Tensor, relevance: Tensor, k: int, build: Build = kernel_matrix, step: Step = greedy_step) -> Tensor:
    return dpp_map(build(tokens, relevance), k, step)


def nearest(offset: Tensor, slope: Tensor, similarity: Tensor, first: Tensor, k: int) -> Tensor:
    """Picks of largest offset - slope * largest similarity to a pick: (B, k)."""
    batch = torch.arange(len(first), device=first.device)
    residual = torch.full_like(offset, float("inf"))
    picks = [first]
    for _ in range(k - 1):
        residual = residual.minimum(offset - slope * similarity[batch, picks[-1]])
        residual = residual.scatter(1, picks[-1][:, None], float("-inf"))
        picks.append(residual.argmax(-1))
    return torch.stack(picks, 1)


def max_min(tokens: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = normalise(tokens)
    similarity = torch.bmm(unit, unit.mT)
    others = similarity.diagonal_scatter(similarity.new_full(tokens.shape[:2], -1.0), dim1=1, dim2=2)
    return nearest(relevance, relevance, similarity, (relevance * (1 - others.amax(-1))).argmax(-1), k)


def mmr(tokens: Tensor, relevance: Tensor, k: int, balance: float = 0.5) -> Tensor:
    unit = normalise(tokens)
    slope = torch.full_like(relevance, 1 - balance)
    return nearest(balance * relevance, slope, torch.bmm(unit, unit.mT), relevance.argmax(-1), k)


def bipartite_redundancy(similarity: Tensor, threshold: float = 0.2, gamma: float = 1.0, min_degree: int = 4) -> Tensor:
    """rho of the source tokens from their similarities with the destinations, (B, M, M') -> (B, M)."""
    near = similarity >= threshold
    degree = near.sum(-1)
    mean = (similarity * near).sum(-1) / degree.clamp(min=1)
    redundancy = degree * torch.exp(gamma * (mean - threshold))
    density = similarity.mean(-1)
    return torch.where(degree >= min_degree, redundancy, 0.5 * redundancy + 0.5 * density)


def drop_redundant(redundancy: Tensor, count: int, keep: int) -> Tensor:
    """The mask (B, N) without the N - keep most redundant source tokens."""
    dropped = redundancy.topk(count - keep, dim=-1).indices * 2
    mask = torch.ones(redundancy.shape[0], count, dtype=torch.bool, device=redundancy.device)
    return mask.scatter(1, dropped, False)


def gsp(tokens: Tensor, keep: int, redundancy: Callable[[Tensor], Tensor] = bipartite_redundancy) -> Tensor:
    """One round of GSP: the mask (B, N)."""
    unit = normalise(tokens)
    return drop_redundant(redundancy(torch.bmm(unit[:, 0::2], unit[:, 1::2].mT)), tokens.shape[1], keep)


def bipartite_match(tokens: Tensor, threshold: float = 0.2) -> tuple[Tensor, ...]:
    unit = normalise(tokens)
    similarity = torch.bmm(unit[:, 0::2], unit[:, 1::2].mT)
    near = similarity >= threshold
    degree = near.sum(-1)
    best, match = similarity.max(-1)
    return best, 2 * match + 1, degree, (similarity * near).sum(-1) / degree.clamp(min=1), similarity.mean(-1)


def mask_intersect(ranking: Tensor, mask: Tensor, k: int) -> Tensor:
    """A stable sort brings the members to the front, each part in its order; the first k, ascending."""
    order = mask.gather(1, ranking).logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices[:, :k]
    return ranking.gather(1, order).sort(dim=-1).values


def query_relevance(tokens: Tensor, query: Tensor) -> Tensor:
    cosine = torch.matmul(normalise(tokens), normalise(query).mT).mean(-1)
    low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
    return (cosine - low) / (high - low)


def prune(
    tokens: Tensor,
    query: Tensor | None,
    keep: int,
    ranks: int,
    survivors: int,
    build: Build = kernel_matrix,
    step: Step = greedy_step,
    redundancy: Callable[[Tensor], Tensor] = bipartite_redundancy,
) -> Tensor:
    """Relevance, GSP, QCSP with `ranks` picks, the intersection filled up to `keep`: (B, keep) ascending."""
    relevance = tokens.new_ones(tokens.shape[:2]).float() if query is None else query_relevance(tokens, query)
    ranking = qcsp(tokens, relevance, ranks, build, step)
    return mask_intersect(ranking, gsp(tokens, survivors, redundancy), keep)


def compiled(op: str) -> Callable[..., object]:
    """The same function under torch.compile.

    The loop stays in Python and its step is compiled once for all t (its third call makes t a dynamic size): an
    unrolled loop takes minutes to compile beyond a hundred picks.
    """
    torch._dynamo.reset()
    step: Step = torch.compile(greedy_step)
    build: Build = torch.compile(kernel_matrix, dynamic=False)
    redundancy: Callable[[Tensor], Tensor] = torch.compile(bipartite_redundancy, dynamic=False)
    looped: dict[str, Callable[..., object]] = {
        "dpp_map": partial(dpp_map, step=step),
        "qcsp": partial(qcsp, build=build, step=step),
        "gsp": partial(gsp, redundancy=redundancy),
        "prune": partial(prune, build=build, step=step, redundancy=redundancy),
    }
    return looped.get(op) or torch.compile(globals()[op], dynamic=False)


def numpy_dpp_map(kernel: np.ndarray, k: int) -> np.ndarray:
    """The fast greedy MAP of Chen et al. 2018, one image after the other: (B, k)."""
    picks = np.empty((kernel.shape[0], k), dtype=np.int64)
    for item, matrix in enumerate(kernel):
        residual = matrix.diagonal().copy()
        rows = np.empty((k, matrix.shape[0]), dtype=matrix.dtype)
        for t in range(k):
            pick = int(residual.argmax())
            picks[item, t] = pick
            rows[t] = (matrix[pick] - rows[:t, pick] @ rows[:t]) / np.sqrt(residual[pick])
            residual -= np.square(rows[t])
            residual[pick] = -np.inf
    return picks


def numpy_qcsp(tokens: np.ndarray, relevance: np.ndarray, k: int) -> np.ndarray:
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    kernel = relevance[:, :, None] * (unit @ unit.swapaxes(1, 2)) * relevance[:, None, :]
    return numpy_dpp_map(kernel, k)
