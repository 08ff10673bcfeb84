"""gsp against its float64 oracle, where rounding cannot decide, and its rules for ties and rounds."""

import functools

import pytest
import torch

from script_kernels import reference, testing
from script_kernels.options import GspOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def clear_cut_tokens(kind, n, d, keep, *, dtype=torch.float32, **options):
    """Tokens (1, n, d) on which every decision of gsp is clear of rounding; the first seed that gives such."""
    for seed in range(100):
        tokens = testing.make_tokens(kind, 1, n, d, dtype=dtype, seed=seed)
        if kind == "photo":
            tokens = tokens[:, torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        if testing.gsp_is_clear_cut(tokens, keep, GspOptions(**options)):
            return tokens
    raise AssertionError("no clear-cut tokens in 100 seeds")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize(
    ("n", "keep", "options"),
    [
        (96, 72, {}),
        (97, 49, {}),
        (97, 48, {}),
        (96, 96, {}),
        (96, 20, {"rounds": 4}),
        (97, 71, {"rounds": 3, "gamma": -2.0}),
        (64, 48, {"min_degree": 0}),
        (64, 48, {"min_degree": 1000, "threshold": 0.5}),
        (64, 40, {"threshold": -0.1, "gamma": 4.0}),
    ],
)
def test_against_float64(backend, kind, dtype, n, keep, options):
    tokens = clear_cut_tokens(kind, n, 32, keep, dtype=dtype, **options)
    expected_mask, expected_redundancy = reference.gsp(tokens, keep, dtype=torch.float64, **options)
    mask, redundancy = backend.gsp(tokens.to(backend.device), keep, **options)
    assert (mask.dtype, redundancy.dtype) == (torch.bool, torch.float32)
    assert torch.equal(mask.cpu(), expected_mask)
    torch.testing.assert_close(redundancy.cpu().double(), expected_redundancy, rtol=1e-5, atol=1e-6)


def test_against_float64_at_full_size(backend):
    threshold = testing.gap_threshold(testing.make_tokens("photo", 1, 577, 128), 0.6)
    tokens = testing.make_tokens("photo", 1, 577, 128, device=backend.device)
    _, expected = reference.gsp(tokens.cpu(), 433, threshold=threshold, dtype=torch.float64)
    mask, redundancy = backend.gsp(tokens, 433, threshold=threshold)
    torch.testing.assert_close(redundancy.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert mask.sum() == 433


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*testing.ADVERSARIAL, *testing.KINDS])
@pytest.mark.parametrize(("n", "keep"), [(60, 37), (61, 50), (61, 30)])
def test_one_round_drops_the_largest_scores_the_higher_index_first(backend, dtype, name, n, keep):
    """Exact, given the scores that the op itself returns."""
    make = testing.make_tokens if name in testing.KINDS else testing.adversarial_tokens
    tokens = make(name, 2, n, 16, dtype=dtype, device=backend.device)
    mask, redundancy = backend.gsp(tokens, keep)
    assert not redundancy.isnan().any()
    for b in range(2):
        score = redundancy[b].tolist()
        dropped = sorted(range(0, n, 2), key=lambda i: (-score[i], -i))[: n - keep]
        assert mask[b].tolist() == [i not in dropped for i in range(n)]
        assert all(score[i] == 0 for i in range(1, n, 2))


@pytest.mark.parametrize(("n", "rounds", "keep"), [(40, 1, 33), (40, 3, 16), (41, 3, 16), (577, 2, 433)])
def test_equal_tokens_the_lower_index_stays(backend, n, rounds, keep):
    tokens = testing.adversarial_tokens("identical", 1, n, 8, device=backend.device)
    left = list(range(n))
    for done in range(rounds):
        quota = -(-(len(left) - keep) // (rounds - done))
        gone = left[0::2][::-1][:quota]
        left = [i for i in left if i not in gone]
    assert backend.gsp(tokens, keep, rounds=rounds)[0][0].nonzero()[:, 0].tolist() == left


def test_copies_among_the_sources_the_lower_index_stays(backend):
    """All sources are one row, and face different destinations."""
    tokens = testing.make_tokens("gaussian", 1, 577, 48, device=backend.device)
    tokens[:, 0::2] = tokens[:, :1].clone()
    mask, redundancy = backend.gsp(tokens, 500)
    sources = redundancy[0, 0::2]
    assert (sources == sources[0]).all()
    assert (~mask[0]).nonzero()[:, 0].tolist() == list(range(576 - 2 * 76, 577, 2))


@pytest.mark.parametrize("keep", [8, 16])
def test_keeping_everything_still_scores(backend, keep):
    tokens = testing.make_tokens("clustered", 1, keep, 8, device=backend.device)
    mask, redundancy = backend.gsp(tokens, keep, rounds=3, min_degree=0)
    assert mask.all()
    expected = reference.gsp(tokens.cpu(), keep, rounds=1, min_degree=0, dtype=torch.float64)[1]
    torch.testing.assert_close(redundancy.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_one_token(backend):
    mask, redundancy = backend.gsp(torch.ones(2, 1, 3, device=backend.device), 1)
    assert mask.tolist() == [[True], [True]]
    assert redundancy.tolist() == [[0.0], [0.0]]


def test_two_tokens_keep_one(backend):
    mask, _ = backend.gsp(torch.ones(1, 2, 3, device=backend.device), 1)
    assert mask.tolist() == [[False, True]]


def test_empty_batch(backend):
    mask, redundancy = backend.gsp(torch.empty(0, 10, 4, device=backend.device), 5)
    assert mask.shape == redundancy.shape == (0, 10)
    assert (mask.dtype, redundancy.dtype) == (torch.bool, torch.float32)


@pytest.mark.parametrize(
    ("n", "keep", "rounds", "enough"), [(100, 10, 1, 8), (100, 10, 7, 8), (9, 1, 1, 3), (10, 4, 1, 2)]
)
def test_error_names_the_rounds_that_work(backend, n, keep, rounds, enough):
    tokens = testing.make_tokens("gaussian", 1, n, 4, device=backend.device)
    with pytest.raises(ValueError, match=rf"keep: {keep} of N = {n} .*rounds = {rounds}\b.*needs rounds >= {enough}"):
        backend.gsp(tokens, keep, rounds=rounds)
    mask, _ = backend.gsp(tokens, keep, rounds=enough)
    assert mask.sum() == keep


@pytest.mark.parametrize("gamma", [1e300, -1e300])
def test_parameters_beyond_float32(op, gamma):
    """As float32, such a gamma is infinite, and infinite times a mean that equals the threshold would be NaN."""
    tokens = torch.tensor([1.0, 0.0], device=op.device).expand(1, 8, 2)
    mask, redundancy = op.gsp(tokens, 6, threshold=1.0, gamma=gamma)
    assert not redundancy.isnan().any()
    assert mask[0].tolist() == [True, True, True, True, False, True, False, True]
