"""Input makers and the step-wise certificate, shared by tests/ and bench/."""

import math

import numpy as np
import torch
from torch import Tensor

from script_kernels import reference
from script_kernels.options import GspOptions

KINDS = ("gaussian", "clustered", "powerlaw", "photo")

ADVERSARIAL = (
    "duplicates",
    "identical",
    "rank3",
    "zero_rows",
    "all_zero",
    "bad_rows",
    "all_bad",
    "denormal",
    "largest",
    "wide_range",
    "narrow_range",
    "kahan",
)


# --- inputs


def make_tokens(
    kind: str,
    B: int,
    N: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Tokens (B, N, D) of a kind in KINDS; the same values on every device.

    gaussian: independent normal entries. clustered: N/12 centres, each token near one. powerlaw: a spectrum falling as
    1/j in a random basis, plus a mean common to all tokens. photo: 16 x 16 patches of a photograph, as D random
    projections.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        x = torch.randn(B, N, D, generator=generator)
    elif kind == "clustered":
        clusters = max(1, N // 12)
        centre = torch.randn(B, clusters, D, generator=generator)
        member = torch.randint(clusters, (B, N), generator=generator)
        x = centre.gather(1, member[:, :, None].expand(-1, -1, D)) + 0.3 * torch.randn(B, N, D, generator=generator)
    elif kind == "powerlaw":
        scale = torch.arange(1, D + 1, dtype=torch.float32).reciprocal()
        mixing = torch.randn(D, D, generator=generator) / math.sqrt(D)
        x = (torch.randn(B, N, D, generator=generator) * scale) @ mixing
        x = x + x.square().mean().sqrt() * torch.randn(D, generator=generator)
    elif kind == "photo":
        x = _photo_patches(B, N)
        x = x @ (torch.randn(x.shape[2], D, generator=generator) / math.sqrt(x.shape[2]))
    else:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    return x.to(dtype).to(device)


def _photo_patches(B: int, N: int) -> Tensor:
    """(B, N, 768): patches of 16 x 16 pixels on a regular grid; each image of the batch is a crop of the photograph.

    Every patch's mean intensity is replaced by one small value, so that flat patches are alike but not zero.
    """
    from skimage import data

    photo = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255  # (3, 512, 512)
    side = math.ceil(math.sqrt(N))
    size = 512 - 8 * min(B, 8)  # crops shifted by 8 pixels
    corner = torch.linspace(0, size - 16, side).round().long()
    patches = torch.empty(B, N, 768)
    for b in range(B):
        crop = photo[:, 8 * (b % 8) :, 8 * (b // 8 % 8) :]
        windows = crop.unfold(1, 16, 1).unfold(2, 16, 1)[:, corner][:, :, corner]  # (3, side, side, 16, 16)
        patches[b] = windows.permute(1, 2, 0, 3, 4).reshape(side * side, 768)[:N]
    return patches - patches.mean(-1, keepdim=True) + 0.05


def make_query(
    B: int, Q: int, C: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Query vectors (B, Q, C) of independent normal entries."""
    return torch.randn(B, Q, C, generator=torch.Generator().manual_seed(seed + 7919)).to(dtype).to(device)


def make_relevance(B: int, N: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Relevance (B, N) float32, uniform in [0, 1)."""
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed + 104729)).to(device)


def adversarial_tokens(
    name: str,
    B: int,
    N: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Tokens (B, N, D) of a name in ADVERSARIAL.

    duplicates: N/5 distinct rows. identical: one row N times. rank3: a three-dimensional subspace. zero_rows, bad_rows:
    a third of the rows are zero, or hold a NaN or an Inf. denormal: whole multiples of the smallest denormal. largest:
    up to the largest finite value. wide_range: rows scaled over the whole range of the dtype. narrow_range: a common
    row plus differences near its rounding error. kahan: the columns of Kahan's matrix, of which any are nearly
    dependent though a pivoted Cholesky does not tell, over and over.
    """
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    x = torch.randn(B, N, D, generator=generator)
    if name == "duplicates":
        x = x[:, torch.randint(max(1, N // 5), (N,), generator=generator)]
    elif name == "identical":
        x = x[:, :1].expand(B, N, D)
    elif name == "rank3":
        x = torch.randn(B, N, 3, generator=generator) @ torch.randn(3, D, generator=generator)
    elif name == "zero_rows":
        x[:, torch.rand(N, generator=generator) < 1 / 3] = 0.0
    elif name == "all_zero":
        x = torch.zeros(B, N, D)
    elif name in ("bad_rows", "all_bad"):
        bad = torch.rand(B, N, generator=generator) < (1 / 3 if name == "bad_rows" else 2)
        value = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, (B, N), generator=generator)]
        place = torch.randint(D, (B, N, 1), generator=generator)
        x = torch.where(bad[:, :, None] & (torch.arange(D) == place), value[:, :, None], x)
    elif name == "denormal":
        x = torch.randint(-9, 10, (B, N, D), generator=generator).double() * (info.smallest_normal * info.eps)
    elif name == "largest":
        x = (2 * torch.rand(B, N, D, generator=generator).double() - 1) * info.max
    elif name == "wide_range":
        low, high = math.log2(info.smallest_normal), math.log2(info.max) - 4
        power = low + (high - low) * torch.rand(B, N, 1, generator=generator).double()
        x = x.clamp(-4, 4).double() * 2.0**power
    elif name == "narrow_range":
        x = x[:, :1] * (1 + 2 * info.eps * torch.randint(-1, 2, (B, N, D), generator=generator))
    elif name == "kahan":
        cosine = 0.6 - 0.2 * torch.rand(B, 1, 1, generator=generator).double()
        scale = (1 - cosine**2).sqrt() ** torch.arange(D)[:, None]
        columns = scale * (torch.eye(D) - cosine * torch.ones(D, D).triu(1))  # (B, D, D)
        x = columns.mT[:, torch.arange(N) % D] if D else columns.new_zeros(B, N, D)
    else:
        raise ValueError(f"name: expected one of {ADVERSARIAL}, got {name!r}")
    return x.to(dtype).contiguous().to(device)


LAYOUTS = ("contiguous", "transposed", "inner_strided", "sliced", "offset")


def as_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with NaN (-1 for integers, True for bool) in the memory around them.

    transposed: the first two dimensions swapped in memory. inner_strided: the last two swapped, so the inner stride is
    not 1. sliced: every other row and entry of a larger tensor. offset: starting one element into its storage.
    """
    filler = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else -1
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "inner_strided":
        return x.mT.contiguous().mT
    if layout == "sliced":
        around = x.new_full([2 * n + 3 for n in x.shape], filler)
        view = around[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
        return view.copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 2,), filler)[1:-1].view(x.shape).copy_(x)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def gap_threshold(tokens: Tensor, target: float = 0.2, *, clearance: float = 1e-6) -> float:
    """A threshold near ``target`` from which every cosine between two tokens of an image is further than ``clearance``.

    It lies in the middle of the widest gap between the float64 cosines in [target - 0.05, target + 0.05].
    """
    cosines = kernel64(tokens).flatten()
    near = cosines[(cosines - target).abs() <= 0.05].sort().values
    near = torch.cat([near.new_tensor([target - 0.05]), near, near.new_tensor([target + 0.05])])
    widest = int(near.diff().argmax())
    assert near[widest + 1] - near[widest] > 2 * clearance, "no gap that wide: use fewer tokens or another seed"
    return float(near[widest] + near[widest + 1]) / 2


# --- the certificate of an exact greedy


def kernel64(
    tokens: Tensor,
    relevance: Tensor | None = None,
    *,
    power: float = 1.0,
    normalize: bool = True,
    ridge: float = 0.0,
) -> Tensor:
    """The float64 kernel L = diag(r) S diag(r) (B, N, N), on the CPU, of exactly the given tokens and relevance.

    Zero rows, rows holding NaN or Inf, and tokens whose relevance is not finite get zero rows and columns. power,
    normalize, ridge: as `script_kernels.qcsp` has them; the ridge is only on the diagonal of tokens that are not bad.
    """
    x = tokens.detach().cpu().double()
    bad = ~torch.isfinite(x).all(-1)
    x = x.masked_fill(bad[..., None], 0.0)
    if normalize:
        norm = x.square().sum(-1, keepdim=True).sqrt()
        x = x / norm.masked_fill(norm == 0, 1.0)
    if relevance is not None:
        r = relevance.detach().cpu().double()
        bad = bad | ~torch.isfinite(r)
        x = x * (r.masked_fill(bad, 0.0) if power == 1 else (r.abs() ** power).masked_fill(bad, 0.0))[..., None]
    kernel = x @ x.mT
    kernel.diagonal(dim1=1, dim2=2).add_(ridge * ~bad)
    return kernel


def kernel64_of(kernel: Tensor) -> Tensor:
    """A given float32 kernel (B, N, N) in float64, on the CPU, with non-finite entries handled as ``dpp_map`` does."""
    k = kernel.detach().cpu().double()
    bad = ~torch.isfinite(k.diagonal(dim1=1, dim2=2))
    return torch.where(torch.isfinite(k) & ~bad[:, :, None] & ~bad[:, None, :], k, 0.0)


def certify(kernel64: Tensor, indices: Tensor, gains: Tensor | None = None, *, tol: float = 1e-5) -> Tensor:
    """Checks a selection (B, k) or (k,) against the exact greedy on kernel64 (B, N, N) or (N, N), step by step.

    Walks the sequence with a float64 Cholesky. At every step the pick must be in range, unselected, and of a residual
    variance of at least the largest one of all unselected tokens; gains, like ``indices`` in shape, must be the picks'
    residuals, at most the largest float32. Either may miss by tol * max_i K_ii, or by what rounding K to float32 moves
    the residual by (`_rounding`) where that is more. Returns the exact residuals of the picks, like ``indices`` in
    shape. Raises AssertionError with the first step that fails.
    """
    if kernel64.dim() == 2:
        return certify(kernel64[None], indices[None], None if gains is None else gains[None], tol=tol)[0]
    assert kernel64.dtype == torch.float64, f"certify needs a float64 kernel, got {kernel64.dtype}"
    assert indices.dtype == torch.int64, f"indices: expected int64, got {indices.dtype}"
    assert indices.shape[0] == kernel64.shape[0], f"{indices.shape[0]} sequences for {kernel64.shape[0]} kernels"
    if gains is not None:
        assert gains.shape == indices.shape, f"gains: expected {tuple(indices.shape)}, got {tuple(gains.shape)}"
        gains = gains.detach().cpu().double()
    exact = torch.zeros(indices.shape, dtype=torch.float64)
    for b, (K, i) in enumerate(zip(kernel64, indices.cpu(), strict=True)):
        given = None if gains is None else gains[b].numpy()
        exact[b] = torch.from_numpy(_certify_image(K.numpy(), i.numpy(), given, tol, b))
    return exact


def _certify_image(K: np.ndarray, indices: np.ndarray, given: np.ndarray | None, tol: float, image: int) -> np.ndarray:
    N, k = K.shape[0], len(indices)
    residual = np.maximum(np.diag(K), 0.0)
    free = np.ones(N, dtype=bool)
    factor = np.zeros((k, N))
    gains = np.zeros(k)
    scale = residual.max(initial=0.0)
    for t, pick in enumerate(indices):
        where = f"image {image}, step {t}"
        assert 0 <= pick < N, f"{where}: index {pick} is not in [0, {N})"
        assert free[pick], f"{where}: token {pick} was already selected"
        pivots = np.flatnonzero(factor[:t].any(1))
        rows, columns = factor[pivots], indices[pivots]
        better = np.flatnonzero(free & (residual > residual[pick] + tol * scale))
        for best in better[np.argsort(-residual[better])]:
            either = _rounding(K, rows, columns, pick) + _rounding(K, rows, columns, best)
            assert residual[best] <= residual[pick] + either, (
                f"{where}: picked token {pick} of residual {residual[pick]:.9g}, but token {best} has "
                f"{residual[best]:.9g} (largest K_ii {scale:.9g})"
            )
        gains[t] = residual[pick]
        if given is not None:
            error = abs(given[t] - min(gains[t], float(np.finfo(np.float32).max)))
            assert error <= tol * scale or error <= _rounding(K, rows, columns, pick), (
                f"{where}: a gain of {given[t]:.9g} for token {pick}, whose residual is {gains[t]:.9g} "
                f"(largest K_ii {scale:.9g})"
            )
        free[pick] = False
        # Smaller pivots only come past the rank, where the rule has no updates; a kernel rounded to float32 is not
        # positive semidefinite to better than this.
        if residual[pick] > 1e-7 * scale:
            factor[t] = (K[pick] - factor[:t, pick] @ factor[:t]) / math.sqrt(residual[pick])
            residual = np.maximum(residual - factor[t] ** 2, 0.0)
    return gains


def _rounding(K: np.ndarray, factor: np.ndarray, picks: np.ndarray, token: int) -> float:
    """How far a token's residual moves where every K_ij is off by 2^-22 sqrt(K_ii K_jj): four roundings to float32.

    The residual is v' K v, v being 1 at the token and less its weights in the picks at these: it moves by at most 2^-22
    (sum_i |v_i| sqrt(K_ii))^2. The weights grow where picks are nearly dependent, and then a float32 kernel does not
    hold more digits of the residual, whatever is computed of it.
    """
    weights = np.linalg.solve(factor[:, picks], factor[:, token]) if len(picks) else np.zeros(0)
    roots = np.sqrt(np.maximum(np.diag(K), 0.0))
    return float((roots[token] + np.abs(weights) @ roots[picks]) ** 2 * 2.0**-22)


def certify_max_min(tokens: Tensor, relevance: Tensor | None, indices: Tensor, *, tol: float = 1e-5) -> Tensor:
    """Checks farthest points first, step by step: tokens (B, N, D), relevance (B, N) or None, indices (B, k).

    Every pick must be of a residual, relevance * least distance to the picks before (the first: to all other tokens),
    of at least the largest one of all free tokens, less tol * twice the largest relevance; tokens with NaN or Inf come
    last, by index. Returns the exact residuals (B, k). Raises AssertionError with the first step that fails.
    """
    bad, r = _bad_and_relevance(tokens, relevance)
    r = r.clamp(min=0)
    cosines = kernel64(tokens)
    others = cosines.masked_fill(torch.eye(cosines.shape[1], dtype=torch.bool) | bad[:, None, :], -1.0)
    start = r * (1 - others.amax(-1)) if cosines.shape[1] else r
    return _certify_nearest(cosines, r, r, start, bad, indices.cpu(), tol)


def certify_mmr(
    tokens: Tensor, relevance: Tensor, indices: Tensor, balance: float = 0.5, *, tol: float = 1e-5
) -> Tensor:
    """The same for maximal marginal relevance, whose residual is its score.

    The tolerance is a share of the reach of the scores: balance * that of the relevance, and 2 * (1 - balance).
    """
    bad, r = _bad_and_relevance(tokens, relevance)
    slope = torch.full_like(r, 1 - balance)
    return _certify_nearest(kernel64(tokens), balance * r, slope, balance * r, bad, indices.cpu(), tol)


def _bad_and_relevance(tokens: Tensor, relevance: Tensor | None) -> tuple[Tensor, Tensor]:
    bad = reference.bad_rows(tokens).cpu()
    r = torch.ones(tokens.shape[:2]) if relevance is None else relevance.detach().cpu()
    bad = bad | ~torch.isfinite(r)
    return bad, r.double().masked_fill(bad, 0.0)


def _certify_nearest(
    cosines: Tensor, offset: Tensor, slope: Tensor, start: Tensor, bad: Tensor, indices: Tensor, tol: float
) -> Tensor:
    """Walks picks of the largest offset - slope * (largest cosine to a pick); `start` is what the first goes by."""
    assert indices.dtype == torch.int64, f"indices: expected int64, got {indices.dtype}"
    found = torch.zeros(indices.shape, dtype=torch.float64)
    for b in range(len(indices)):
        good = ~bad[b]
        zero_slope = slope[b].masked_fill(bad[b], 0.0).max() if good.any() else torch.zeros(())
        reach = (offset[b][good].max() - offset[b][good].min() if good.any() else 0.0) + 2 * zero_slope
        residual, free = start[b].clone(), torch.ones_like(bad[b])
        for t, pick in enumerate(indices[b].tolist()):
            where = f"image {b}, step {t}"
            assert 0 <= pick < len(free), f"{where}: index {pick} is not in [0, {len(free)})"
            assert free[pick], f"{where}: token {pick} was already selected"
            left = free & good
            if left.any():
                assert good[pick], f"{where}: picked token {pick}, which is bad, before one that is not"
                best = int(residual.masked_fill(~left, -math.inf).argmax())
                assert residual[pick] >= residual[best] - tol * reach, (
                    f"{where}: picked token {pick} of residual {residual[pick]:.9g}, but token {best} has "
                    f"{residual[best]:.9g}"
                )
                found[b, t] = residual[pick]
                fresh = offset[b] - slope[b] * cosines[b, pick]
                residual = fresh if t == 0 else torch.minimum(residual, fresh)
            else:
                assert pick == int(free.int().argmax()), f"{where}: bad tokens go by index, got {pick}"
            free[pick] = False
    return found


def greedy_margin(kernel64: Tensor, k: int) -> float:
    """The smallest lead of a pick over the runner-up in k exact greedy steps on (N, N), as a share of max K_ii.

    Where it is well above the certificate's tolerance there is only one valid sequence, and implementations must agree.
    """
    K = kernel64.numpy().copy()
    scale, margin = K.diagonal().max(), math.inf
    free = np.ones(len(K), dtype=bool)
    for _ in range(min(k, len(K) - 1)):
        residual = np.where(free, K.diagonal(), -np.inf)
        second, first = np.argsort(residual)[-2:]
        margin = min(margin, (residual[first] - residual[second]) / scale)
        K -= np.outer(K[:, first], K[first]) / K[first, first]
        free[first] = False
    return float(margin)


def gsp_is_clear_cut(tokens: Tensor, keep: int, options: GspOptions) -> bool:
    """Whether float32 rounding cannot change what gsp keeps of tokens (1, N, D).

    In every round, no cosine is within 1e-6 of the threshold, and the last token dropped leads the first one kept by
    1e-5 of its score.
    """
    quotas = reference.gsp_quotas(tokens.shape[1], keep, options.rounds)
    assert quotas is not None, "keep cannot be reached"
    left = torch.arange(tokens.shape[1])
    for quota in quotas:
        sources, destinations = tokens[:, left[0::2]], tokens[:, left[1::2]]
        cosines = reference.cosine(sources, destinations, torch.float64)
        if ((cosines - options.threshold).abs() <= 1e-6).any():
            return False
        _, _, degree, mean, density = reference.bipartite_match(tokens[:, left], options.threshold, dtype=torch.float64)
        rho = reference.redundancy_score(degree, mean, density, options.threshold, options.gamma, options.min_degree)[0]
        score, order = rho.sort(descending=True)
        if 0 < quota < len(score) and score[quota - 1] - score[quota] <= 1e-5 * max(1.0, abs(float(score[quota - 1]))):
            return False
        gone = set(left[0::2][order[:quota]].tolist())
        left = torch.tensor([i for i in left.tolist() if i not in gone])
    return True


def certify_fallback(indices: Tensor, gains: Tensor, order: Tensor, bad: Tensor) -> None:
    """Checks the picks past the rank, which are those from the first gain of 0 on.

    indices, gains (B, k); order (B, N): what they go by, largest first (relevance, or L_ii for ``dpp_map``); bad (B, N)
    bool: go last. They must be the first of the unselected tokens in that order, lower index first between equals.
    Raises AssertionError.
    """
    for b in range(indices.shape[0]):
        zero = (gains[b] == 0).cpu()
        rank = int(zero.int().argmax()) if zero.any() else len(zero)
        assert zero[rank:].all(), f"image {b}: a gain past the rank (step {rank}) is not 0: {gains[b, rank:].tolist()}"
        taken = set(indices[b, :rank].tolist())
        key = order[b].masked_fill(bad[b], -math.inf).tolist()
        rest = sorted((i for i in range(len(key)) if i not in taken), key=lambda i: (bool(bad[b, i]), -key[i], i))
        expected, got = rest[: len(zero) - rank], indices[b, rank:].tolist()
        assert got == expected, f"image {b}: past the rank (step {rank}) expected {expected}, got {got}"
