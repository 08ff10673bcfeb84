"""Several CTAs of one image that wait for each other: the exchange of keys, in orders drawn at random.

The hardware's rule (volatile polls order what follows them, L1 may be stale) holds; PTX's own does not, and says where.
"""

import pytest
import test_dpp
import torch

from ptx.launch import PtxBackend, interpreted
from ptx.memory import RaceError
from script_kernels import reference, testing
from script_kernels.triton.dpp_map import launch_dpp_map
from script_kernels.triton.kernels import plan

slow = pytest.mark.slow
SEEDS = [1, *(pytest.param(seed, marks=slow) for seed in range(2, 8))]


def matrix(n, kind="clustered"):
    return testing.kernel64(testing.make_tokens(kind, 1, n, 48), testing.make_relevance(1, n)).float()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("n", "columns"), [(193, 64), pytest.param(300, 64, marks=slow), pytest.param(515, 256, marks=slow)]
)
def test_programs_that_wait_for_each_other(n, columns, seed):
    kernel = matrix(n)
    with interpreted(seed=seed) as launches:
        indices, gains = launch_dpp_map(kernel, 19, columns=columns)
    assert [(x.grid, x.cooperative) for x in launches] == [(-(-n // columns), True)]
    kernel64 = testing.kernel64_of(kernel)
    good = torch.zeros(1, n, dtype=torch.bool)
    test_dpp.assert_greedy(indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), good)


def small_chunks(monkeypatch):
    """Chunks of 8 rows of C, so that few picks meet all that `project` does: two at once, one with what is left, that
    alone."""
    monkeypatch.setitem(plan.ASKED_TWICE, 64, 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_others_asked_for_at_once(seed, monkeypatch):
    small_chunks(monkeypatch)
    kernel = matrix(130)
    with interpreted(seed=seed):
        indices, gains = launch_dpp_map(kernel, 38, columns=64)
    kernel64 = testing.kernel64_of(kernel)
    test_dpp.assert_greedy(
        indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), torch.zeros(1, 130, dtype=torch.bool)
    )


@slow
def test_rows_of_others_in_chunks_of_full_size():
    tokens, relevance = testing.make_tokens("photo", 1, 200, 256), testing.make_relevance(1, 200)
    kernel = testing.kernel64(tokens, relevance).float()
    with interpreted(seed=1):
        indices, gains = launch_dpp_map(kernel, 199, columns=64)
    kernel64 = testing.kernel64_of(kernel)
    test_dpp.assert_greedy(
        indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), torch.zeros(1, 200, dtype=torch.bool)
    )


@slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["rank3", "bad_rows", "zero_rows", "all_bad"])
@pytest.mark.parametrize("route", [{"columns": 64}, {"columns": 128, "matrix_free": True}], ids=["matrix", "features"])
def test_every_change_of_level_passes_through_the_exchange(route, name, seed):
    tokens, relevance = testing.adversarial_tokens(name, 1, 140, 12), torch.ones(1, 140)
    indices, gains = PtxBackend(seed=seed).qcsp(tokens, relevance, 15, **route)
    bad = test_dpp.bad_tokens(tokens, relevance)
    test_dpp.assert_greedy(indices, gains, testing.kernel64(tokens, relevance), relevance, bad)


@slow
@pytest.mark.parametrize("combine", ["intersect", "restrict"])
@pytest.mark.parametrize("seed", range(3))
def test_prune_of_images_in_several_programs(combine, seed, monkeypatch):
    """Flags that end the walk, or tiers, and the keys' room cleared by an earlier kernel."""
    monkeypatch.setattr(plan, "SINGLE_WORK", 0)
    tokens, query = testing.make_tokens("clustered", 2, 140, 24), testing.make_query(1, 3, 24)
    backend = PtxBackend(seed=seed)
    kept = backend.prune(tokens, query, 20, combine=combine)
    assert [x.grid for x in backend.launches if x.kernel == "greedy_kernel"] == [6]
    assert torch.equal(kept, reference.prune(tokens, query, 20, combine=combine, dtype=torch.float64))


@slow
@pytest.mark.parametrize("seed", range(2))
def test_packed_segments_in_several_programs(seed, monkeypatch):
    monkeypatch.setattr(plan, "SINGLE_WORK", 0)
    tokens, bounds = testing.make_tokens("clustered", 1, 230, 24)[0], torch.tensor([0, 90, 90, 230], dtype=torch.int32)
    query = testing.make_query(3, 3, 24)
    backend = PtxBackend(seed=seed)
    kept = backend.prune_varlen(tokens, bounds, query, [12, 0, 17])
    assert any(x.cooperative and x.grid > 2 for x in backend.launches)
    assert torch.equal(kept, reference.prune_varlen(tokens, bounds, query, [12, 0, 17], dtype=torch.float64))


def test_what_ptx_does_not_promise():
    """Without the rule that volatile loads order what follows, entries of C that others wrote are read unordered."""
    with interpreted(seed=1, volatile_acquires=False), pytest.raises(RaceError, match=r"p_factor.*ld\.global\.cg"):
        launch_dpp_map(matrix(130), 5, columns=64)
