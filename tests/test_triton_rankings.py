"""max_min, mmr, and the options of qcsp, query_relevance and prune, by the Triton launchers."""

import math

import pytest
import torch
from triton_interpreter import BACKEND, DEVICE, bounds_checked, quiet

from script_kernels import reference, testing
from script_kernels.options import PruneOptions, QcspOptions
from script_kernels.triton.max_min import launch_max_min
from script_kernels.triton.mmr import launch_mmr
from script_kernels.triton.prune_varlen import launch_prune_varlen
from script_kernels.triton.qcsp import launch_qcsp

ROUTES = [{"matrix_free": False}, {"matrix_free": True}, {"matrix_free": False, "columns": 64}]


def example(n: int, dtype: torch.dtype = torch.float32, kind: str = "clustered"):
    return testing.make_tokens(kind, 2, n, 24, dtype=dtype, device=DEVICE), testing.make_relevance(2, n, device=DEVICE)


@quiet
@pytest.mark.parametrize(("route", "dtype"), [(ROUTES[0], torch.bfloat16), *((r, torch.float32) for r in ROUTES[1:])])
def test_max_min_is_farthest_point_first(route, dtype):
    tokens, relevance = example(70, dtype)
    tokens[0, 5, 3] = math.nan
    tokens[1, 7] = 0.0
    tokens[:, 20:24] = tokens[:, 10:14]
    for r in (None, relevance):
        indices, gains = launch_max_min(tokens, r, 4, **route)
        exact = testing.certify_max_min(tokens, r, indices.cpu())
        torch.testing.assert_close(gains.cpu().double(), exact, rtol=0, atol=1e-5)


@quiet
@pytest.mark.parametrize(("route", "balance"), [(ROUTES[0], 0.0), (ROUTES[1], 0.4), (ROUTES[2], 1.0)])
def test_mmr_trades_relevance_for_similarity(route, balance):
    tokens, relevance = example(70)
    tokens[0, 5, 3] = math.nan
    relevance[1, 2] = math.inf
    relevance[1, 3] = -2.0
    indices, gains = launch_mmr(tokens, relevance, 4, balance, **route)
    exact = testing.certify_mmr(tokens, relevance, indices.cpu(), balance)
    torch.testing.assert_close(gains.cpu().double(), exact, rtol=0, atol=1e-5)


@quiet
def test_all_tokens_are_ranked_and_ties_go_to_the_lowest_index():
    tokens = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 20, 1).to(DEVICE)
    assert launch_max_min(tokens, None, 20)[0].tolist() == [list(range(20))]
    assert launch_mmr(tokens, torch.full((1, 20), 0.3, device=DEVICE), 20)[0].tolist() == [list(range(20))]
    tokens[0, 4] = math.inf
    assert launch_max_min(tokens, None, 20)[0][0, -1] == 4


@quiet
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_far_relevances(scale):
    tokens, relevance = example(20)
    relevance = relevance * scale
    indices, gains = launch_max_min(tokens, relevance, 6)
    exact = testing.certify_max_min(tokens, relevance, indices.cpu())
    torch.testing.assert_close(gains.cpu().double() / scale, exact / scale, rtol=0, atol=1e-5)
    testing.certify_mmr(tokens, relevance, launch_mmr(tokens, relevance, 6)[0].cpu())


@quiet
@pytest.mark.parametrize(
    ("route", "options"),
    [
        (ROUTES[0], {"power": 3.0, "ridge": 0.2}),
        (ROUTES[1], {"normalize": False}),
        (ROUTES[1], {"power": 0.0}),
        (ROUTES[2], {"normalize": False, "ridge": 1e3}),
    ],
)
def test_the_kernel_of_qcsp_is_the_one_its_options_describe(route, options):
    tokens, relevance = example(70, kind="powerlaw")
    tokens = tokens * (1 + torch.arange(70, device=DEVICE)[None, :, None] % 7)
    tokens[0, 5, 3] = math.nan
    indices, gains = launch_qcsp(tokens, relevance, 5, QcspOptions(**options), **route)
    kernel = testing.kernel64(tokens, relevance, **options)
    exact = testing.certify(kernel, indices.cpu())
    scale = kernel.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    assert ((gains.cpu() - exact).abs() <= 1e-5 * scale).all()


@quiet
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_powers_far_from_one(scale):
    """Squares of entries around 2^-4000 and 2^4000: no float64 holds them, their logarithms do."""
    tokens, relevance = example(20)
    indices, gains = launch_qcsp(tokens, relevance * scale, 5, QcspOptions(power=60.0))
    near, _ = launch_qcsp(tokens, relevance, 5, QcspOptions(power=60.0))
    assert torch.equal(indices, near)
    most = torch.finfo(torch.float32).max if scale > 1 else 0.0
    assert (gains[:, 0] == most).all()


@quiet
@pytest.mark.parametrize(("dtype", "negate"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_largest_cosine(dtype, negate):
    tokens, _ = example(40, dtype)
    tokens[0, 5, 3] = math.nan
    tokens[1, 7] = 0.0
    tokens[1, 8:12] *= 2.0**50
    query = testing.make_query(2, 34, 24, dtype=dtype, device=DEVICE)
    query[0, 3] = math.inf
    mask = (torch.arange(34, device=DEVICE) % 3 == 1)[None]
    for q, m in (
        (query, None),
        (query[:1], mask),
        (query.mT.contiguous().mT, mask.expand(2, 34)),
        (query, mask & False),
    ):
        got = BACKEND.query_relevance(tokens, q, m, negate=negate, reduce="max")
        exact = reference.query_relevance(tokens, q, m, negate=negate, reduce="max", dtype=torch.float64)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)


@quiet
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "options", [{"reduce": "max", "power": 2.0, "floor": 0.2}, {"power": 0.0}, {"combine": "union"}]
)
def test_prune_by_the_other_options(options, aligned):
    tokens, _ = example(40)
    other = testing.make_tokens("gaussian", 2, 40, 16, device=DEVICE) if aligned else None
    query = testing.make_query(2, 5, 16 if aligned else 24, device=DEVICE)
    kept = BACKEND.prune(tokens, query, 9, aligned=other, **options)
    exact = reference.prune(tokens, query, 9, aligned=other, dtype=torch.float64, **options)
    assert torch.equal(kept.cpu(), exact.cpu())
    starts = torch.tensor([0, 40, 80], dtype=torch.int32, device=DEVICE)
    flat = None if other is None else other.flatten(0, 1)
    if "combine" in options:
        with pytest.raises(ValueError, match="expected 'intersect' or 'restrict' for packed segments on CUDA"):
            launch_prune_varlen(tokens.flatten(0, 1), starts, query, [9, 9], PruneOptions(**options), aligned=flat)
        return
    packed = BACKEND.prune_varlen(tokens.flatten(0, 1), starts, query, [9, 9], aligned=flat, **options)
    assert torch.equal(packed.view(2, 9) - starts[:-1, None], kept)


@quiet
def test_no_access_leaves_the_tensors():
    tokens, relevance = example(37)
    query = testing.make_query(2, 3, 24, device=DEVICE)
    with bounds_checked() as checked:
        launch_max_min(tokens, relevance, 2)
        launch_max_min(tokens, None, 2, matrix_free=True)
        launch_mmr(tokens, relevance, 2)
        BACKEND.query_relevance(tokens, query, reduce="max")
    assert checked[0] > 0
