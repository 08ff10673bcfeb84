"""query_relevance against its float64 oracle, and its rules for constant, zero, bad and masked vectors."""

import math

import pytest
import torch

from script_kernels import reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_relevance(backend, tokens, query, mask=None, *, negate=False):
    """Holds the result to the oracle: a float32 cosine is right to 1e-6, which the min-max stretches."""
    cpu_mask = None if mask is None else mask.cpu()
    expected = reference.query_relevance(tokens.cpu(), query.cpu(), cpu_mask, negate=negate, dtype=torch.float64)
    result = backend.query_relevance(tokens, query, mask, negate=negate)
    assert result.dtype == torch.float32
    assert result.shape == tokens.shape[:2]
    cosines = reference.cosine(tokens.cpu(), query.cpu().expand(tokens.shape[0], -1, -1), torch.float64)
    if cpu_mask is None:
        score = cosines.mean(-1)
    else:
        weight = cpu_mask.expand(tokens.shape[0], -1).double()
        score = (cosines * weight[:, None]).sum(-1) / weight.sum(-1, keepdim=True)
    spread = score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True)
    assert ((result.cpu() - expected).abs() <= 4e-6 / spread).all()
    assert ((result >= 0) & (result <= 1)).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize(("shape", "Q"), [((2, 577, 64), 3), ((3, 64, 1024), 1), ((1, 33, 7), 20)])
def test_against_float64(backend, kind, dtype, shape, Q):
    tokens = testing.make_tokens(kind, *shape, dtype=dtype, device=backend.device)
    query = testing.make_query(shape[0], Q, shape[2], dtype=dtype, device=backend.device)
    assert_relevance(backend, tokens, query)
    assert_relevance(backend, tokens, query, negate=True)
    assert_relevance(backend, tokens, query[:1])


def test_width_of_one(backend):
    tokens = torch.tensor([[[2.0], [-3.0], [0.0], [1e-30]]], device=backend.device)
    query = torch.tensor([[[5.0]]], device=backend.device)
    assert backend.query_relevance(tokens, query).tolist() == [[1.0, 0.0, 0.5, 1.0]]
    assert backend.query_relevance(tokens, query, negate=True).tolist() == [[0.0, 1.0, 0.5, 0.0]]


def test_query_of_one_image_serves_all(backend):
    tokens = testing.make_tokens("gaussian", 3, 40, 16, device=backend.device)
    query = testing.make_query(1, 4, 16, device=backend.device)
    mask = torch.tensor([[True, False, True, True]], device=backend.device)
    shared = backend.query_relevance(tokens, query, mask)
    repeated = backend.query_relevance(tokens, query.repeat(3, 1, 1), mask.repeat(3, 1))
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("mask_batch", [1, 2])
def test_masked_vectors_are_left_out(backend, mask_batch):
    tokens = testing.make_tokens("gaussian", 2, 50, 16, device=backend.device)
    query = testing.make_query(2, 5, 16, device=backend.device)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]], device=backend.device)
    mask = mask[:mask_batch]
    result = assert_relevance(backend, tokens, query, mask)
    poisoned = query.clone()
    poisoned[~mask.expand(2, -1)] = math.nan
    torch.testing.assert_close(backend.query_relevance(tokens, poisoned, mask), result, rtol=0, atol=1e-6)
    if mask_batch == 1:
        chosen = backend.query_relevance(tokens, query[:, mask[0]])
        torch.testing.assert_close(chosen, result, rtol=0, atol=1e-5)


def test_all_masked_gives_ones(backend):
    tokens = testing.make_tokens("gaussian", 2, 10, 4, device=backend.device)
    tokens[1, 3] = math.nan
    mask = torch.zeros(2, 3, dtype=torch.bool, device=backend.device)
    expected = torch.ones(2, 10)
    expected[1, 3] = 0
    assert torch.equal(
        backend.query_relevance(tokens, testing.make_query(2, 3, 4, device=backend.device), mask).cpu(), expected
    )


@pytest.mark.parametrize("spoil", ["zero", "nan", "inf"])
def test_zero_and_bad_query_vectors_have_cosine_zero(backend, spoil):
    tokens = testing.make_tokens("gaussian", 2, 30, 8, device=backend.device)
    query = testing.make_query(2, 3, 8, device=backend.device)
    query[0, 1] = 0.0
    if spoil != "zero":
        query[0, 1, 5] = math.nan if spoil == "nan" else -math.inf
    result = assert_relevance(backend, tokens, query)
    # Every mean falls by the same factor, which the min-max takes out again.
    without = backend.query_relevance(tokens[:1], query[:1, [0, 2]])
    torch.testing.assert_close(result[:1], without, rtol=0, atol=1e-5)
    query[0] = 0.0
    assert (backend.query_relevance(tokens, query)[0] == 1).all()


@pytest.mark.parametrize("negate", [False, True])
def test_bad_tokens_stay_out_of_the_min_max(backend, negate):
    """All finite tokens lean towards the query, so that a cosine of 0 taken in for a bad one would be the smallest."""
    query = testing.make_query(1, 1, 8, device=backend.device)
    tokens = testing.make_tokens("gaussian", 1, 30, 8, device=backend.device) + 3 * query
    good = torch.ones(30, dtype=torch.bool)
    good[[0, 13, 29]] = False
    clean = backend.query_relevance(tokens[:, good.to(backend.device)], query, negate=negate)
    tokens[0, 0, 0], tokens[0, 13, 7], tokens[0, 29] = math.nan, math.inf, -math.inf
    result = backend.query_relevance(tokens, query, negate=negate)
    assert (result.cpu()[0, ~good] == 0).all()
    torch.testing.assert_close(result.cpu()[0, good], clean.cpu()[0], rtol=0, atol=1e-5)


def test_zero_tokens_take_part_with_cosine_zero(backend):
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]], device=backend.device)
    query = torch.tensor([[[1.0, 0.0]]], device=backend.device)
    assert backend.query_relevance(tokens, query).tolist() == [[1.0, 0.5, 0.0, 0.5]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_gives_ones(backend, dtype):
    query = testing.make_query(2, 3, 16, dtype=dtype, device=backend.device)
    for name in ("identical", "all_zero"):
        tokens = testing.adversarial_tokens(name, 2, 20, 16, dtype=dtype, device=backend.device)
        assert (backend.query_relevance(tokens, query) == 1).all()
    scale = 2.0 ** torch.arange(-5, 15, device=backend.device)  # one direction: constant up to rounding
    tokens = testing.make_tokens("gaussian", 2, 1, 16, device=backend.device) * scale[:, None]
    assert (backend.query_relevance(tokens.to(dtype), query) == 1).all()
    assert (backend.query_relevance(tokens.to(dtype)[:, :1], query) == 1).all()  # N = 1
    bad = testing.adversarial_tokens("all_bad", 2, 20, 16, dtype=dtype, device=backend.device)
    assert (backend.query_relevance(bad, query) == 0).all()


@pytest.mark.parametrize(("spread", "constant"), [(5e-7, True), (4e-6, False)])
def test_what_counts_as_constant(backend, spread, constant):
    """Token 1 is turned away from the query by a cosine of ``spread``."""
    angle = math.acos(0.6)
    turned = math.acos(0.6 - spread)
    tokens = torch.tensor([[[math.cos(a), math.sin(a)] for a in (angle, turned)]], device=backend.device)
    result = backend.query_relevance(tokens, torch.tensor([[[1.0, 0.0]]], device=backend.device))
    assert result.tolist() == ([[1.0, 1.0]] if constant else [[1.0, 0.0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_get_equal_relevance_wherever_they_stand(backend, dtype):
    base = testing.make_tokens("gaussian", 1, 29, 48, dtype=dtype, device=backend.device)
    copy_of = torch.randint(29, (577,), generator=torch.Generator().manual_seed(1)).to(backend.device)
    scale = 2.0 ** (torch.arange(577, device=backend.device) % 3)
    tokens = base[:, copy_of] * scale[:, None].to(dtype)
    result = backend.query_relevance(tokens, testing.make_query(1, 5, 48, dtype=dtype, device=backend.device))[0]
    first = torch.stack([result[copy_of == c][0] for c in range(29)])
    assert torch.equal(result, first[copy_of])


@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d in DTYPES for n in ("denormal", "largest", "wide_range")])
def test_extreme_magnitudes(backend, dtype, name):
    tokens = testing.adversarial_tokens(name, 2, 50, 24, dtype=dtype, device=backend.device)
    assert_relevance(backend, tokens, testing.make_query(2, 3, 24, dtype=dtype, device=backend.device))
    query = testing.adversarial_tokens(name, 2, 3, 24, dtype=dtype, seed=1, device=backend.device)
    assert_relevance(backend, tokens, query)


def test_empty(backend):
    query = testing.make_query(1, 2, 8, device=backend.device)
    assert backend.query_relevance(torch.empty(0, 5, 8, device=backend.device), query).shape == (0, 5)
    assert backend.query_relevance(torch.empty(3, 0, 8, device=backend.device), query).shape == (3, 0)
