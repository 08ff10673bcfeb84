"""Every op once on small odd shapes and views; short enough for compute-sanitizer, which runs this file on a GPU."""

import pytest
import torch
from torch import Tensor

import script_kernels
from script_kernels import testing


def assert_distinct(indices: Tensor, limit: int) -> None:
    ordered = indices.cpu().sort(dim=-1).values
    assert bool((ordered >= 0).all() and (ordered < limit).all() and (ordered.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "N", "D", "k"), [(1, 1, 4, 1), (3, 63, 40, 9), (2, 100, 33, 100), (1, 577, 64, 64)])
def test_every_op(B: int, N: int, D: int, k: int, dtype: torch.dtype, device: str) -> None:
    wide = testing.make_tokens("gaussian", B, N, 2 * D, dtype=dtype, device=device)
    tokens = wide[:, :, 1 : D + 1]  # rows are not contiguous with each other
    query = testing.make_query(1, 3, D, dtype=dtype, device=device)
    relevance = script_kernels.query_relevance(tokens, query)
    assert bool(((relevance >= 0) & (relevance <= 1)).all())

    indices, gains = script_kernels.qcsp(tokens, relevance, k)
    assert_distinct(indices, N)
    testing.certify(testing.kernel64(tokens, relevance), indices)
    assert bool((gains >= 0).all())
    kernel = testing.kernel64(tokens).float().to(device)
    testing.certify(testing.kernel64_of(kernel), script_kernels.dpp_map(kernel, k)[0])

    best, match, degree, _, _ = script_kernels.bipartite_match(tokens)
    assert best.shape == match.shape == degree.shape == (B, (N + 1) // 2)
    mask, _ = script_kernels.gsp(tokens, N - N // 4, rounds=2)
    assert mask.sum(-1).tolist() == [N - N // 4] * B

    ranking = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(B)])
    found = script_kernels.mask_intersect(ranking.to(device), mask, k).cpu()
    assert torch.equal(found, script_kernels.mask_intersect(ranking, mask.cpu(), k))
    if device != "cpu":  # where it is an error
        ranking[:, ::2] = torch.tensor([-1, 2**62, N])[torch.arange((N + 1) // 2) % 3]
        assert_distinct(torch.ops.script.mask_intersect(ranking.to(device), mask, k), N)

    for combine in ("intersect", "restrict"):
        assert_distinct(script_kernels.prune(tokens, query, k, combine=combine), N)
    ends = torch.arange(0, B * N + 1, N, dtype=torch.int32, device=device)
    packed = script_kernels.prune_varlen(tokens.reshape(-1, D), ends, query, [k] * B)
    alone = script_kernels.prune(tokens, query, k) + ends[:-1, None]
    assert torch.equal(packed, alone.flatten())
