"""mask_intersect against a three-line Python model, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import script_kernels.numpy as script_numpy
from script_kernels import testing


def model(ranking: list[int], mask: list[bool], k: int) -> list[int]:
    kept = [i for i in ranking if mask[i]]
    rest = [i for i in ranking if not mask[i]]
    return sorted((kept + rest)[:k])


@st.composite
def problems(draw):
    batch, n = draw(st.integers(0, 4)), draw(st.integers(1, 200))
    pool = draw(st.integers(1, n))
    k = draw(st.integers(1, pool))
    seed, share = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    ranking = torch.empty(batch, pool, dtype=torch.int64)
    for b in range(batch):
        ranking[b] = torch.randperm(n, generator=generator)[:pool]
    return ranking, torch.rand(batch, n, generator=generator) < share, k


@given(problem=problems(), layout=st.sampled_from(testing.LAYOUTS))
def test_equals_the_model(backend, problem, layout):
    ranking, mask, k = problem
    result = backend.mask_intersect(
        testing.as_layout(ranking, layout).to(backend.device), testing.as_layout(mask, layout).to(backend.device), k
    )
    assert result.dtype == torch.int64
    assert result.tolist() == [model(r, m, k) for r, m in zip(ranking.tolist(), mask.tolist(), strict=True)]


@pytest.mark.parametrize(("pool", "k"), [(128, 64), (640, 320), (2880, 1), (2880, 2880)])
def test_full_size(backend, pool, k):
    generator = torch.Generator().manual_seed(0)
    ranking = torch.stack([torch.randperm(2880, generator=generator)[:pool] for _ in range(2)])
    mask = torch.rand(2, 2880, generator=generator) < 0.75
    result = backend.mask_intersect(ranking.to(backend.device), mask.to(backend.device), k)
    assert result.tolist() == [model(r, m, k) for r, m in zip(ranking.tolist(), mask.tolist(), strict=True)]


def test_by_hand(backend):
    ranking = torch.tensor([[5, 0, 3, 1], [2, 4, 1, 0]], device=backend.device)
    mask = torch.tensor([[True, True, False, False, True, False], [False] * 6], device=backend.device)
    assert backend.mask_intersect(ranking, mask, 3).tolist() == [[0, 1, 5], [1, 2, 4]]


def test_expanded_inputs(backend):
    ranking = torch.tensor([[5, 0, 3, 1]], device=backend.device).expand(3, 4)
    mask = torch.tensor([True], device=backend.device).expand(3, 6)
    assert backend.mask_intersect(ranking, mask, 2).tolist() == [[0, 5]] * 3


ODD = torch.tensor([[2, 0, 128, 0, 255, 0, 3, 0, 1, 0]], dtype=torch.uint8)


def test_a_mask_is_bytes_that_are_zero_or_not(op):
    """Bytes viewed as bools hold what they hold; a bool of neither value left the output unwritten."""
    mask = ODD.view(torch.bool).to(op.device)
    ranking = torch.arange(10).flip(0)[None].to(op.device)
    for k in range(1, 11):
        assert op.mask_intersect(ranking, mask, k).tolist() == [model(ranking[0].tolist(), (ODD[0] != 0).tolist(), k)]


def test_numpy_reads_masks_alike():
    mask = ODD.numpy().view(bool)
    ranking = torch.arange(10).flip(0)[None]
    for k in range(1, 11):
        kept = script_numpy.mask_intersect(ranking.numpy(), mask, k).tolist()
        assert kept == [model(ranking[0].tolist(), (ODD[0] != 0).tolist(), k)]


def test_a_query_mask_is_bytes_that_are_zero_or_not(op):
    tokens = testing.make_tokens("gaussian", 1, 30, 8, seed=1)
    query = testing.make_tokens("gaussian", 1, 10, 8, seed=2)
    odd, plain = ODD.view(torch.bool), ODD != 0
    moved = [x.to(op.device) for x in (tokens, query, odd, plain)]
    assert torch.equal(op.query_relevance(*moved[:3]), op.query_relevance(*moved[:2], moved[3]))
    kept = [op.prune(*moved[:2], 7, query_mask=mask).tolist() for mask in moved[2:]]
    assert kept[0] == kept[1]
    arrays = tokens.numpy(), query.numpy(), odd.numpy()
    assert script_numpy.prune(*arrays[:2], 7, query_mask=arrays[2]).tolist() == kept[1]
