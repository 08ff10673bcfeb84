"""The public functions: each checks its arguments and calls the op of the same name in `torch.ops.script`.

What holds for all of them. `tokens` are float32, bfloat16 or float16 in any strides, on the CPU or on CUDA; products
are accumulated in float32. Outputs are new, contiguous, and never require grad. A token that holds NaN or Inf anywhere
counts as a zero row of relevance 0 and is picked last; a zero row is similar to nothing. Ties go to the lowest index.
An image alone and the same image in a batch give the same result, bit for bit, run after run. On CUDA nothing
synchronises with the host.

Bad arguments raise before any work: ValueError (values, shapes, devices) or TypeError (dtypes, types), with a message
`argument: expected what, got what came`.

Sources: Script, arXiv 2512.01949 (GSP, QCSP, their intersection); CDPruner, arXiv 2506.10967 (relevance in the kernel);
Chen et al. 2018, arXiv 1709.05135 (greedy MAP of a DPP); ToMe, arXiv 2210.09461 (bipartite matching).
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, ops  # noqa: F401  (ops registers torch.ops.script)
from .options import GspOptions, ImageOptions, PruneOptions, QcspOptions

__all__ = [
    "bipartite_match",
    "dpp_map",
    "gsp",
    "mask_intersect",
    "max_min",
    "mmr",
    "prune",
    "prune_varlen",
    "qcsp",
    "query_relevance",
]

# While a graph is traced the checks are left to the op: its fake has checked what is static, and its implementation
# checks the rest when the graph runs. Here they would only put guards on symbolic sizes.


def query_relevance(
    tokens: torch.Tensor,
    query: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    *,
    negate: bool = False,
    reduce: str = "mean",
) -> torch.Tensor:
    """How much each token has to do with the question: its cosines to the query vectors, min-max scaled per image.

    Args:
        tokens: (B, N, C), tokens in the query's space.
        query: (B, Q, C), or (1, Q, C) for one question to all images; Q >= 1; dtype and device of `tokens`.
        query_mask: (B, Q) or (1, Q) bool, True for the query vectors that count; None: all.
        negate: flip the sign before the scaling, for encoders whose patch/text cosine is inverted (CLIP).
        reduce: "mean" takes the mean of a token's cosines to the vectors that count, "max" the largest of them (so that
            one word that fits is not averaged away); `negate` flips what comes out.

    Returns:
        (B, N) float32 in [0, 1]. All ones where the cosines of an image differ by 1e-6 at most.

    Raises:
        ValueError: shapes or devices that do not fit, or another `reduce`.
        TypeError: not a floating dtype of the above, or different dtypes.

    Source: Script and CDPruner, relevance scores.

    >>> tokens, query = torch.eye(3)[None], torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> script_kernels.query_relevance(tokens, query)
    tensor([[1., 0., 0.]])
    """
    if not torch.compiler.is_compiling():
        checks.query_relevance(tokens, query, query_mask, negate, reduce)
    return torch.ops.script.query_relevance.default(tokens, query, query_mask, negate=negate, reduce=reduce)


def bipartite_match(
    tokens: torch.Tensor, threshold: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compares every source token (even positions) with every destination token (odd positions) by cosine.

    Args:
        tokens: (B, N, D).
        threshold: similarities >= threshold are edges of the graph.

    Returns:
        Five tensors of shape (B, ceil(N / 2)), one entry per source token:
        best: float32, the largest similarity.
        match: int32, the index (in 0..N) of the first destination that has it.
        degree: int32, the number of edges.
        mean: float32, the mean similarity over the edges; 0 without any.
        density: float32, the mean similarity over all destinations.
        With N = 1 there is no destination: 0, and -1 for match.

    Raises:
        ValueError: wrong shape, or a threshold that is not finite.
        TypeError: not a floating dtype of the above.

    Source: ToMe (bipartite matching) and Script (degree and mean over the thresholded graph).

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]])
    >>> best, match, degree, mean, density = script_kernels.bipartite_match(tokens)
    >>> match
    tensor([[3, 1]], dtype=torch.int32)
    """
    if not torch.compiler.is_compiling():
        checks.bipartite_match(tokens, threshold)
    return torch.ops.script.bipartite_match.default(tokens, threshold)


def gsp(
    tokens: torch.Tensor,
    keep: int,
    *,
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Graph-structured pruning: drops the source tokens that the destinations can best stand in for.

    Redundancy of a source token: degree * exp(gamma * (mean - threshold)), see `bipartite_match`; with fewer edges than
    `min_degree`, half of that plus half the density. The most redundant ones go. Each round splits the survivors anew
    and drops its share, ceil(left / rounds left).

    Args:
        tokens: (B, N, D).
        keep: tokens to keep, 1 <= keep <= N.
        threshold: similarities >= threshold are edges of the graph.
        gamma: weight of the mean similarity.
        min_degree: edges from which on a token counts as embedded in the graph.
        rounds: how many rounds, at most 100; one round drops at most half.

    Returns:
        mask: (B, N) bool with exactly `keep` True per image.
        redundancy: (B, N) float32, the score a token had when it was last a source, 0 if it never was.

    Raises:
        ValueError: wrong shape; `keep` out of range, or not to be reached in `rounds` (the message says how many it
            takes).
        TypeError: not a floating dtype of the above.

    Source: Script, graph-structured pruning.

    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> script_kernels.gsp(tokens, keep=3)[0]
    tensor([[False,  True,  True,  True]])
    """
    options: dict[str, Any] = {"threshold": threshold, "gamma": gamma, "min_degree": min_degree, "rounds": rounds}
    if not torch.compiler.is_compiling():
        checks.gsp(tokens, keep, GspOptions(**options))
    return torch.ops.script.gsp.default(tokens, keep, **options)


def dpp_map(kernel: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy MAP of a determinantal point process: k times the token of largest residual variance.

    This is diagonally pivoted Cholesky, stopped after k pivots, and exact: no pick is approximate. The rank is
    exhausted when the largest residual is at most 1e-6 of the largest diagonal entry; the remaining picks go by
    diagonal entry, then index. A token whose diagonal entry is not finite is picked last; other entries that are not
    finite count as 0.

    Args:
        kernel: (B, N, N) float32, symmetric and positive semi-definite; row j is read when j is picked.
        k: picks, 1 <= k <= N.

    Returns:
        indices: (B, k) int64, in the order of picking.
        gains: (B, k) float32, the residual variance at each pick, 0 past the rank.

    Raises:
        ValueError: not square, or k out of range.
        TypeError: not float32.

    Source: Chen et al. 2018, algorithm 1.

    >>> kernel = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 2.0, 0.0], [0.0, 0.0, 0.5]]])
    >>> script_kernels.dpp_map(kernel, k=2)[0]
    tensor([[1, 0]])
    """
    if not torch.compiler.is_compiling():
        checks.dpp_map(kernel, k)
    return torch.ops.script.dpp_map.default(kernel, k)


def qcsp(
    tokens: torch.Tensor,
    relevance: torch.Tensor,
    k: int,
    *,
    power: float = 1.0,
    normalize: bool = True,
    ridge: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query-conditioned semantic pruning: a set that is relevant and diverse, as a ranking.

    Greedy MAP (see `dpp_map`) of the kernel L = diag(r) S diag(r), S the cosine similarities, or of one of its kin,
    diag(|r|^power) S diag(|r|^power) + ridge I. Past the rank the picks go by relevance, then index.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32, for example of `query_relevance`; on the device of `tokens`. Its sign makes no
            difference to the kernel.
        k: picks, 1 <= k <= N.
        power: 0 <= power <= 64; 0 leaves the relevance out.
        normalize: False: S is X X^T, the products of the rows as they are (ResPrune).
        ridge: what is added to the kernel's diagonal, >= 0. Greedy log det(I + gamma G G^T) is that of the rows G with
            ridge 1 / gamma (OTPrune).

    Returns:
        indices: (B, k) int64, best first.
        gains: (B, k) float32, the residual variance at each pick, 0 past the rank.

    Raises:
        ValueError: shapes or devices that do not fit, or k or an option out of range.
        TypeError: not a floating dtype of the above, or a relevance that is not float32.

    Source: Script, query-conditioned semantic pruning; CDPruner; ResPrune (arXiv 2603.21105) and OTPrune
    (arXiv 2602.20205) for the options.

    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    >>> script_kernels.qcsp(tokens, torch.tensor([[0.9, 1.0, 0.5]]), k=2)[0]
    tensor([[1, 2]])
    """
    options: dict[str, Any] = {"power": power, "normalize": normalize, "ridge": ridge}
    if not torch.compiler.is_compiling():
        checks.qcsp(tokens, relevance, k, QcspOptions(**options))
    return torch.ops.script.qcsp.default(tokens, relevance, k, **options)


def max_min(tokens: torch.Tensor, relevance: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Farthest points first: k times the token that is farthest from all that are picked, by 1 - cosine.

    The first pick is the token whose nearest other token is farthest. With a relevance each token's distance counts
    relevance times. Exact: no pick is approximate. Tokens with NaN or Inf come last, and are nobody's neighbours.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32 on the device of `tokens`, a negative one counts as 0; None: 1 for all.
        k: picks, 1 <= k <= N.

    Returns:
        indices: (B, k) int64, in the order of picking.
        gains: (B, k) float32, relevance times distance to the nearest earlier pick at each pick, at the first to the
            nearest other token (2 if there is none); 0 for tokens with NaN or Inf.

    Raises:
        ValueError: shapes or devices that do not fit, or k out of range.
        TypeError: not a floating dtype of the above, or a relevance that is not float32.

    Source: DivPrune (arXiv 2503.02175); Gonzalez 1985 (farthest-point clustering).

    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> script_kernels.max_min(tokens, None, k=3)[0]
    tensor([[3, 0, 2]])
    """
    if not torch.compiler.is_compiling():
        checks.max_min(tokens, relevance, k)
    return torch.ops.script.max_min.default(tokens, relevance, k)


def mmr(
    tokens: torch.Tensor, relevance: torch.Tensor, k: int, *, balance: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximal marginal relevance: k times the largest balance * r - (1 - balance) * (largest cosine to what is picked).

    For the first pick there is no such cosine, and it counts as 0. Exact: no pick is approximate. Tokens with NaN or
    Inf, in themselves or in their relevance, come last.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32, on the device of `tokens`.
        k: picks, 1 <= k <= N.
        balance: weight of the relevance, 0 <= balance <= 1; 1 ranks by relevance alone.

    Returns:
        indices: (B, k) int64, in the order of picking.
        gains: (B, k) float32, the score at each pick; 0 for tokens with NaN or Inf.

    Raises:
        ValueError: shapes or devices that do not fit, or k or balance out of range.
        TypeError: not a floating dtype of the above, or a relevance that is not float32.

    Source: Carbonell and Goldstein 1998, maximal marginal relevance.

    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    >>> script_kernels.mmr(tokens, torch.tensor([[0.9, 1.0, 0.5]]), k=2)[0]
    tensor([[1, 2]])
    """
    if not torch.compiler.is_compiling():
        checks.mmr(tokens, relevance, k, balance)
    return torch.ops.script.mmr.default(tokens, relevance, k, balance=balance)


def mask_intersect(ranking: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    """The first k members of a ranking that the mask keeps; where these run out, the first of the others.

    Args:
        ranking: (B, P) int64, distinct indices in 0..N, best first; P <= N.
        mask: (B, N) bool, on the device of `ranking`.
        k: how many, 1 <= k <= P.

    Returns:
        (B, k) int64, ascending.

    Raises:
        ValueError: shapes or devices that do not fit, or k out of range.
        TypeError: other dtypes.
        RuntimeError: indices out of range or repeated. On the CPU only: on CUDA, reading them would take a
            synchronisation, and an index out of range counts as one that the mask does not keep.

    Source: Script, joint selection.

    >>> script_kernels.mask_intersect(torch.tensor([[3, 1, 0]]), torch.tensor([[True, False, True, True]]), k=2)
    tensor([[0, 3]])
    """
    if not torch.compiler.is_compiling():
        checks.mask_intersect(ranking, mask, k)
    return torch.ops.script.mask_intersect.default(ranking, mask, k)


def prune(
    tokens: torch.Tensor,
    query: torch.Tensor | None,
    keep: int,
    *,
    aligned: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    floor: float = 0.0,
    power: float = 1.0,
    reduce: str = "mean",
    split: str = "raster",
    grid_width: int | None = None,
) -> torch.Tensor:
    """Which `keep` of an image's N visual tokens a language model should see, given the question.

    Relevance to the query, GSP on the tokens, QCSP on both, and their intersection, in one call.

    Args:
        tokens: (B, N, D).
        query: (B, Q, C) or (1, Q, C), dtype and device of `tokens`; None: all tokens are equally relevant.
        keep: tokens to keep, 1 <= keep <= N.
        aligned: (B, N, C), the tokens in the query's space, dtype and device of `tokens`; None: `tokens` themselves.
            Not looked at without a query.
        query_mask: (B, Q) or (1, Q) bool, True for the query vectors that count. Not looked at without a query.
        negate: flip the sign of the cosines to the query, see `query_relevance`.
        gsp_drop: share of the tokens that GSP drops, 0 <= gsp_drop < 1: it keeps N - floor(gsp_drop * N).
        oversample: QCSP ranks min(N, ceil(oversample * keep)) tokens for the intersection; >= 1.
        combine: "intersect" walks QCSP's ranking for GSP's survivors and fills up from the rest of the ranking;
            "restrict" runs QCSP on GSP's survivors, and on the others after them if they are fewer than `keep`;
            "union" keeps the ceil(keep / 2) tokens that GSP, run on in as many rounds as it takes (`rounds` at least),
            leaves, and fills up from QCSP's ranking of `keep`; `gsp_drop` and `oversample` have no say in it.
        threshold, gamma, min_degree, rounds: see `gsp`.
        floor: QCSP sees relevance r as floor + (1 - floor) * r, 0 <= floor <= 1, so that a token beside the question
            still counts by that much; 1 leaves the question out.
        power: and that to the power of `power`, 0 <= power <= 64.
        reduce: "mean" or "max" of a token's cosines to the query vectors, see `query_relevance`.
        split: which tokens are GSP's sources, which it may drop. "raster": every other one, which in a grid of an even
            width are the even columns. "checker": the squares of one colour of a checkerboard, the tokens being the
            rows of a grid of `grid_width` columns, a divisor of N; the first of equally good tokens is then the one
            that comes first when the pairs of every odd row have changed places.
        grid_width: with split="checker" only.

    Returns:
        (B, keep) int64, distinct and ascending.

    Raises:
        ValueError: shapes, devices or values that do not fit; a `gsp_drop` that `rounds` cannot reach, or half of a
            union's `keep` that no allowed rounds reach.
        TypeError: not a floating dtype of the above, or different dtypes.

    Source: Script; docs/design.md for where it leaves room.

    >>> tokens = torch.randn(2, 576, 64)
    >>> kept = script_kernels.prune(tokens, torch.randn(1, 4, 64), keep=64)
    >>> tokens.gather(1, kept[..., None].expand(-1, -1, 64)).shape
    torch.Size([2, 64, 64])
    """
    options: dict[str, Any] = {
        "negate": negate,
        "gsp_drop": gsp_drop,
        "oversample": oversample,
        "combine": combine,
        "threshold": threshold,
        "gamma": gamma,
        "min_degree": min_degree,
        "rounds": rounds,
        "floor": floor,
        "power": power,
        "reduce": reduce,
        "split": split,
        "grid_width": grid_width,
    }
    if not torch.compiler.is_compiling():
        checks.prune(tokens, query, keep, aligned, query_mask, ImageOptions(**options))
    return torch.ops.script.prune.default(tokens, query, keep, aligned=aligned, query_mask=query_mask, **options)


def prune_varlen(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    query: torch.Tensor | None,
    keep: Sequence[int],
    *,
    aligned: torch.Tensor | None = None,
    negate: bool = False,
    gsp_drop: float = 0.25,
    oversample: float = 2.0,
    combine: str = "intersect",
    threshold: float = 0.2,
    gamma: float = 1.0,
    min_degree: int = 4,
    rounds: int = 1,
    floor: float = 0.0,
    power: float = 1.0,
    reduce: str = "mean",
) -> torch.Tensor:
    """`prune` on S images of different sizes, packed one after the other: the same result as on each alone.

    Args:
        tokens: (T, D).
        cu_seqlens: (S + 1,) int32 on the device of `tokens`: image s is rows cu_seqlens[s] to cu_seqlens[s + 1]. Starts
            at 0, ascends, ends at T; an image may be empty. On CUDA the values are not checked, which would take a
            synchronisation.
        query: (S, Q, C) or (1, Q, C), dtype and device of `tokens`; None: all tokens are equally relevant.
        keep: S ints, tokens to keep of each image; 0 for an empty one.
        aligned: (T, C), the tokens in the query's space, or None.
        negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce: see `prune`.
            On CUDA there is no "union", whose rounds follow from lengths that the host does not know.

    Returns:
        (sum(keep),) int64, indices into the packed tokens, image by image, each ascending.

    Raises:
        ValueError: shapes, devices or values that do not fit; a `gsp_drop` that `rounds` cannot reach, or half of a
            union's `keep` that no allowed rounds reach.
        TypeError: not a floating dtype of the above, or different dtypes.

    Source: as `prune`.

    >>> tokens, cu_seqlens = torch.randn(1000, 64), torch.tensor([0, 600, 1000], dtype=torch.int32)
    >>> script_kernels.prune_varlen(tokens, cu_seqlens, None, keep=[64, 32]).shape
    torch.Size([96])
    """
    options: dict[str, Any] = {
        "negate": negate,
        "gsp_drop": gsp_drop,
        "oversample": oversample,
        "combine": combine,
        "threshold": threshold,
        "gamma": gamma,
        "min_degree": min_degree,
        "rounds": rounds,
        "floor": floor,
        "power": power,
        "reduce": reduce,
    }
    if not torch.compiler.is_compiling():
        given = PruneOptions(**options)
        checks.prune_varlen(tokens, cu_seqlens, query, keep, aligned, given)
        if cu_seqlens.is_cpu and type(cu_seqlens) is torch.Tensor:  # a fake tensor has no values
            checks.segments(cu_seqlens.tolist(), tokens.shape[0], keep, given)
    return torch.ops.script.prune_varlen.default(tokens, cu_seqlens, query, keep, aligned=aligned, **options)
