"""mask_intersect against a three-line Python model, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
