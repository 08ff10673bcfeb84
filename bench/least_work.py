"""The least work of each op: what floors are reckoned from."""

import math
from typing import NamedTuple


class Work(NamedTuple):
    """The least work of an op: floating-point operations (a multiply-add is two) and bytes moved to or from memory."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def query_relevance_work(B: int, N: int, C: int, Q: int, itemsize: int) -> Work:
    """Cosines of N tokens with Q vectors, and the norms of both."""
    return Work(2 * B * N * Q * C + 2 * B * (N + Q) * C, B * (N + Q) * C * itemsize + 4 * B * N)


def bipartite_match_work(B: int, N: int, D: int, itemsize: int) -> Work:
    """The source x destination quarter of S, and the norms."""
    sources, destinations = (N + 1) // 2, N // 2
    return Work(2 * B * sources * destinations * D + 2 * B * N * D, B * N * D * itemsize + 20 * B * sources)


def gsp_work(B: int, N: int, D: int, keep: int, rounds: int, itemsize: int) -> Work:
    """One bipartite match per round, each on what the rounds before it left."""
    work = Work(0, 5 * B * N)  # mask and redundancy
    left = N
    for done in range(rounds):
        work += bipartite_match_work(B, left, D, itemsize)
        quota = math.ceil((left - keep) / (rounds - done))
        if quota == 0:
            break
        left -= quota
    return work


def kernel_work(B: int, N: int, D: int, itemsize: int) -> Work:
    """Building all of L, which is symmetric: one triangle of products, N^2 float32 written."""
    return Work(B * N * (N + 1) * D + 2 * B * N * D, B * N * D * itemsize + 4 * B * N * N)


def dpp_map_work(B: int, N: int, k: int) -> Work:
    """The greedy loop on a ready kernel: step t is a product of (t) with (t, N), an update and an argmax over N.

    Bytes are the diagonal and k rows of L; the factor is counted as staying in cache.
    """
    return Work(B * (N * k * (k - 1) + 4 * N * k), 4 * B * N * (k + 1) + 12 * B * k)


def qcsp_work(B: int, N: int, D: int, k: int, itemsize: int) -> Work:
    """The greedy loop plus the k rows of L that it reads, made from the tokens: no N x N matrix is needed."""
    rows = Work(2 * B * k * N * D + 2 * B * N * D, B * N * D * itemsize + 4 * B * N)
    return Work(rows.flops + dpp_map_work(B, N, k).flops, rows.bytes + 12 * B * k)


def nearest_work(B: int, N: int, D: int, k: int, itemsize: int) -> Work:
    """max_min and mmr: the cosines of k picks with all tokens, and an update and an argmax over N for each.

    For max_min's first pick more are needed; how many, the values decide.
    """
    rows = Work(2 * B * k * N * D + 2 * B * N * D, B * N * D * itemsize + 4 * B * N)
    return Work(rows.flops + 4 * B * N * k, rows.bytes + 12 * B * k)


def mask_intersect_work(B: int, N: int, P: int, k: int) -> Work:
    """No arithmetic: ranking and mask read, k indices written."""
    return Work(0, B * (8 * P + N + 8 * k))


def prune_work(
    B: int,
    N: int,
    D: int,
    keep: int,
    itemsize: int,
    *,
    Q: int = 0,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    rounds: int = 1,
) -> Work:
    """The sum of its stages in the "intersect" mode; Q = 0 stands for no query."""
    pool = min(N, math.ceil(oversample * keep))
    work = gsp_work(B, N, D, N - math.floor(gsp_drop * N), rounds, itemsize)
    work += qcsp_work(B, N, D, pool, itemsize) + mask_intersect_work(B, N, pool, keep)
    return work + query_relevance_work(B, N, D, Q, itemsize) if Q else work
