"""Exactness on the GPU beyond what small CPU tests reach: large shapes, repeatability, hostile rankings."""

import pytest
import torch
from gpu_calls import CALLS, Call
from torch import Tensor

import script_kernels
from script_kernels import testing

FREE_GIB = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0


def test_two_runs_are_bitwise_equal(call: Call) -> None:
    tensors = call.make(0)
    first = call.results(*tensors)
    for _ in range(5):
        # Other work in between: what a run finds in caches and in freed memory is not the same.
        torch.randn(1 << 22, device="cuda").sort()
        for one, other in zip(call.results(*tensors), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["query_relevance", "bipartite_match", "gsp", "qcsp", "prune"])
def test_an_image_alone_and_in_a_batch(name: str) -> None:
    call = CALLS[name]
    tensors = call.make(3)
    together = call.results(*tensors)
    for image in range(tensors[0].shape[0]):
        alone = call.results(*(tensor[image : image + 1] for tensor in tensors))
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[image])


def make_large(kind: str, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = testing.make_tokens(kind, 1, count, width, dtype=dtype, device="cuda")
    return x, testing.make_relevance(1, count, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gaussian", "powerlaw"])
def test_certificate_at_8192_tokens(kind: str, dtype: torch.dtype) -> None:
    x, relevance = make_large(kind, 8192, 512, dtype)
    indices, gains = script_kernels.qcsp(x, relevance, 640)
    exact = testing.certify(testing.kernel64(x, relevance), indices)
    torch.testing.assert_close(gains.cpu().double(), exact, rtol=1e-3, atol=2e-5)


def test_certificate_of_a_ready_kernel_at_8192_tokens() -> None:
    x, relevance = make_large("clustered", 8192, 256, torch.float32)
    kernel = testing.kernel64(x, relevance).float()
    indices, _ = script_kernels.dpp_map(kernel.cuda(), 640)
    testing.certify(kernel.double(), indices)


def test_certificate_where_no_kernel_matrix_is_kept() -> None:
    x, relevance = make_large("powerlaw", 10_001, 128, torch.bfloat16)
    indices, _ = script_kernels.qcsp(x, relevance, 200)
    testing.certify(testing.kernel64(x, relevance), indices)


@pytest.mark.skipif(FREE_GIB < 24, reason="needs 24 GiB of free GPU memory")
def test_kernels_beyond_2_to_the_31_entries() -> None:
    batch, count, k = 33, 8192, 12
    assert batch * count**2 > 2**31
    factor = torch.randn(count, 32, device="cuda")
    kernel = torch.empty(batch, count, count, device="cuda")
    for image in range(batch):
        scaled = factor * (1 + 0.1 * torch.rand(count, 1, device="cuda"))
        torch.mm(scaled, scaled.T, out=kernel[image])
    indices, gains = script_kernels.dpp_map(kernel, k)
    for image in (0, batch // 2, batch - 1):
        alone, gains_alone = script_kernels.dpp_map(kernel[image : image + 1], k)
        assert torch.equal(indices[image], alone[0])
        assert torch.equal(gains[image], gains_alone[0])


@pytest.mark.skipif(FREE_GIB < 24, reason="needs 24 GiB of free GPU memory")
def test_tokens_beyond_2_to_the_31_values() -> None:
    batch, count, width = 65, 8192, 4096
    assert batch * count * width > 2**31
    x = torch.randn(batch, count, width, device="cuda", dtype=torch.bfloat16)
    query = testing.make_query(1, 2, width, dtype=torch.bfloat16, device="cuda")
    last = x[-1:].clone()
    assert torch.equal(script_kernels.query_relevance(x, query)[-1:], script_kernels.query_relevance(last, query))
    for one, other in zip(script_kernels.gsp(x, 7000), script_kernels.gsp(last, 7000), strict=True):
        assert torch.equal(one[-1:], other)


def intersect(ranking: Tensor, mask: Tensor, k: int) -> list[list[int]]:
    """The rule for any ranking: entries out of range are passed over, the lowest tokens complete a short choice."""
    rows = []
    for entries, kept in zip(ranking.tolist(), mask.tolist(), strict=True):
        valid = [token for token in entries if 0 <= token < len(kept)]
        members = [token for token in valid if kept[token]][:k]
        chosen = set(members + [token for token in valid if not kept[token]][: k - len(members)])
        lowest = (token for token in range(len(kept)) if token not in chosen)
        rows.append(sorted(chosen | {next(lowest) for _ in range(k - len(chosen))}))
    return rows


@pytest.mark.parametrize(("count", "length", "k"), [(1, 1, 1), (577, 128, 64), (3000, 2500, 900), (200_000, 1300, 640)])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.9])
def test_mask_intersect_on_valid_and_broken_rankings(count: int, length: int, k: int, density: float) -> None:
    generator = torch.Generator().manual_seed(count)
    ranking = torch.stack([torch.randperm(count, generator=generator)[:length] for _ in range(3)])
    mask = torch.rand(3, count, generator=generator) < density
    found = torch.ops.script.mask_intersect(ranking.cuda(), mask.cuda(), k)
    assert found.tolist() == intersect(ranking, mask, k)
    ranking[1, ::2] = torch.tensor([-1, 2**62, count, -(2**63)])[torch.arange((length + 1) // 2) % 4]
    ranking[2] //= 7
    found = torch.ops.script.mask_intersect(ranking.cuda(), mask.cuda(), k)
    assert found.tolist() == intersect(ranking, mask, k)


def test_mask_intersect_reads_views_where_they_are() -> None:
    ranking = torch.rand(80, 4, device="cuda").argsort(0).T[::2, ::3]
    mask = (torch.rand(80, 5, device="cuda") < 0.5).T[1:4:2]
    assert not ranking.is_contiguous()
    assert not mask.is_contiguous()
    found = torch.ops.script.mask_intersect(ranking, mask, 9)
    assert found.tolist() == intersect(ranking, mask, 9)
