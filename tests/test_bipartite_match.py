"""bipartite_match against its float64 oracle, with thresholds that no cosine is near."""

import math

import pytest
import torch

from script_kernels import reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("best", "match", "degree", "mean", "density")


def assert_match(backend, tokens, threshold):
    expected = dict(zip(NAMES, reference.bipartite_match(tokens.cpu(), threshold, dtype=torch.float64), strict=True))
    result = dict(zip(NAMES, (t.cpu() for t in backend.bipartite_match(tokens, threshold)), strict=True))
    B, N = tokens.shape[:2]
    for name, value in result.items():
        assert value.shape == (B, (N + 1) // 2), name
        assert value.dtype == (torch.int32 if name in ("match", "degree") else torch.float32), name
    assert torch.equal(result["degree"], expected["degree"])
    for name in ("best", "mean", "density"):
        torch.testing.assert_close(
            result[name].double(), expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # The match is a destination whose cosine is the best one, up to rounding.
    assert (result["match"] % 2 == 1).all()
    cosines = reference.cosine(tokens.cpu()[:, 0::2], tokens.cpu()[:, 1::2], torch.float64)
    at_match = cosines.gather(2, result["match"].long()[:, :, None] // 2).squeeze(2)
    assert (at_match >= expected["best"] - 1e-6).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("shape", [(2, 65, 64), (1, 128, 33), (3, 2, 5), (1, 7, 1024)])
def test_against_float64(backend, kind, dtype, shape):
    tokens = testing.make_tokens(kind, *shape, dtype=dtype, device=backend.device)
    assert_match(backend, tokens, testing.gap_threshold(tokens))


@pytest.mark.parametrize("n", [576, 577])
def test_against_float64_at_full_size(backend, n):
    tokens = testing.make_tokens("photo", 1, n, 128, device=backend.device)
    assert_match(backend, tokens, testing.gap_threshold(tokens, 0.6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_adversarial(backend, dtype, name):
    tokens = testing.adversarial_tokens(name, 2, 41, 16, dtype=dtype, device=backend.device)
    assert_match(backend, tokens, testing.gap_threshold(tokens, 0.3))
    assert_match(backend, tokens, testing.gap_threshold(tokens, -0.3))  # here zero and bad rows, of similarity 0, count


def test_all_or_none_are_neighbours(backend):
    tokens = testing.make_tokens("gaussian", 1, 21, 8, device=backend.device)
    _, _, degree, mean, density = backend.bipartite_match(tokens, -1.5)
    assert (degree == 10).all()
    torch.testing.assert_close(mean, density, rtol=0, atol=1e-6)
    _, _, degree, mean, _ = backend.bipartite_match(tokens, 1.5)
    assert (degree == 0).all()
    assert (mean == 0).all()


def test_threshold_is_inclusive(backend):
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 0.0]]], device=backend.device)
    assert backend.bipartite_match(tokens, 0.0)[2].tolist() == [[2, 2]]
    assert backend.bipartite_match(tokens, 1e-6)[2].tolist() == [[1, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_destinations_match_the_lowest(backend, dtype):
    """Destinations are copies of few rows in random order: the match is always the first of its copies."""
    base = testing.make_tokens("gaussian", 1, 7, 48, dtype=dtype, device=backend.device)
    copy_of = torch.randint(7, (288,), generator=torch.Generator().manual_seed(2)).to(backend.device)
    tokens = testing.make_tokens("gaussian", 1, 577, 48, seed=3, dtype=dtype, device=backend.device)
    tokens[:, 1::2] = base[:, copy_of]
    _, match, *_ = backend.bipartite_match(tokens, 0.2)
    first = {2 * int((copy_of == c).int().argmax()) + 1 for c in range(7)}
    assert set(match[0].tolist()) <= first


def test_equal_sources_score_equally(backend):
    base = testing.make_tokens("gaussian", 1, 5, 48, device=backend.device)
    copy_of = (torch.arange(289) % 5).to(backend.device)
    tokens = testing.make_tokens("gaussian", 1, 577, 48, seed=3, device=backend.device)
    tokens[:, 0::2] = base[:, copy_of]
    for name, value in zip(NAMES, backend.bipartite_match(tokens, 0.05), strict=True):
        assert torch.equal(value[0], value[0, :5][copy_of]), name


def test_one_token(backend):
    best, match, degree, mean, density = backend.bipartite_match(torch.ones(2, 1, 3, device=backend.device))
    assert match.tolist() == [[-1], [-1]]
    assert all((x == 0).all() for x in (best, degree, mean, density))
    assert (match.dtype, degree.dtype) == (torch.int32, torch.int32)


def test_width_of_one(backend):
    tokens = torch.tensor([[[2.0], [-1.0], [-4.0], [-9.0], [0.0]]], device=backend.device)
    best, match, degree, mean, density = backend.bipartite_match(tokens, 0.5)
    assert best.tolist() == [[-1.0, 1.0, 0.0]]
    assert match.tolist() == [[1, 1, 1]]
    assert degree.tolist() == [[0, 2, 0]]
    assert mean.tolist() == [[0.0, 1.0, 0.0]]
    assert density.tolist() == [[-1.0, 1.0, 0.0]]


def test_bad_rows_are_similar_to_nothing(backend):
    tokens = testing.make_tokens("gaussian", 1, 9, 4, device=backend.device)
    tokens[0, 2, 1], tokens[0, 5] = math.nan, math.inf
    best, match, degree, mean, density = backend.bipartite_match(tokens, 0.1)
    assert (best[0, 1], match[0, 1], degree[0, 1], mean[0, 1], density[0, 1]) == (0, 1, 0, 0, 0)
    assert not (match == 5).any() or (best[match == 5] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 4)])
def test_empty(backend, shape):
    for value in backend.bipartite_match(torch.empty(shape, device=backend.device)):
        assert value.shape == (shape[0], (shape[1] + 1) // 2)
