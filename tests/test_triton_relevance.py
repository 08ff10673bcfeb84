"""The Triton row statistics and query_relevance, interpreted on CPU tensors or on the GPU where there is one."""

import pytest
import torch
from triton_interpreter import DEVICE, quiet

from script_kernels import reference, testing
from script_kernels.triton.kernels import rows
from script_kernels.triton.kernels.layout import Layout
from script_kernels.triton.kernels.rows import launch_rows
from script_kernels.triton.query_relevance import launch_query_relevance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = quiet


# --- row statistics


def launch_token_stats(tokens):
    """Inverse norms and scales (B, N)."""
    found = launch_rows(tokens, Layout.of(tokens))
    return found.inv_norm.view(tokens.shape[:2]), found.scale.view(tokens.shape[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_row_statistics(name, dtype):
    tokens = testing.adversarial_tokens(name, 2, 21, 70, dtype=dtype)
    inv_norm, scale = (t.cpu() for t in launch_token_stats(tokens.to(DEVICE)))
    bad = ~torch.isfinite(tokens).all(-1)
    zero = (tokens == 0).all(-1)
    assert torch.equal(inv_norm == -1, bad)
    assert torch.equal(inv_norm == 0, zero)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all(), "a scale is not a power of two"
    scaled = tokens.double() * scale.double()[:, :, None]
    usual = ~bad & ~zero
    assert (scaled.abs().amax(-1)[usual] < 2.0**41).all()
    assert (scaled.abs().amax(-1)[usual] > 2.0**-41).all()
    torch.testing.assert_close(inv_norm[usual].double(), 1 / scaled.norm(dim=-1)[usual], rtol=1e-6, atol=0)


def test_ordinary_rows_are_not_scaled():
    _, scale = launch_token_stats(testing.make_tokens("photo", 1, 33, 40, device=DEVICE))
    assert (scale == 1).all()


def test_statistics_of_rows_wider_than_a_block_and_strided():
    wide = testing.make_tokens("gaussian", 2, 9, 1300)
    tokens = wide.to(DEVICE)[:, :, 100:].transpose(0, 1)
    inv_norm, _ = launch_token_stats(tokens)
    torch.testing.assert_close(inv_norm.cpu(), 1 / wide[:, :, 100:].transpose(0, 1).norm(dim=-1), rtol=1e-6, atol=0)


def test_packed_rows_have_the_bits_of_dense_ones():
    """Segments of every length modulo the block, empty ones among them."""
    lengths = [3, 0, 1, 17, 0, 8, 5]
    tokens = testing.make_tokens("gaussian", 1, sum(lengths), 40, device=DEVICE)[0]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    packed = launch_rows(tokens, Layout.of(tokens, bounds)).inv_norm
    assert torch.equal(packed, launch_token_stats(tokens[None])[0][0])


# --- relevance


def assert_relevance(tokens, query, mask=None, *, negate=False):
    """Against float64. The min-max divides the rounding of cosines by their range."""
    relevance = launch_query_relevance(
        tokens.to(DEVICE), query.to(DEVICE), None if mask is None else mask.to(DEVICE), negate
    ).cpu()
    expected = reference.query_relevance(tokens, query, mask, negate=negate, dtype=torch.float64)
    cosine = reference.cosine(tokens, query.expand(len(tokens), -1, -1), torch.float64)
    if mask is not None:
        cosine = cosine * mask[:, None, :]
        cosine = cosine.sum(-1, keepdim=True) / mask.sum(-1).clamp(min=1)[:, None, None]
    cosine = cosine.mean(-1)
    width = cosine.amax(1, keepdim=True) - cosine.amin(1, keepdim=True)
    assert relevance.dtype == torch.float32
    assert ((relevance >= 0) & (relevance <= 1)).all()
    error = (relevance - expected).abs() * width.clamp(max=1)
    assert (error <= 1e-6).all(), error.max()
    return relevance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 8), (2, 1), (63, 72), (100, 513), (577, 40)])
def test_against_float64(n, width, dtype):
    batch = 1 if n == 577 else 2
    tokens = testing.make_tokens("gaussian", batch, n, width, dtype=dtype)
    relevance = assert_relevance(tokens, testing.make_query(batch, 5, width, dtype=dtype))
    if n > 2:
        assert (relevance.amax(1) == 1).all()
        assert (relevance.amin(1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_adversarial(name, dtype):
    tokens = testing.adversarial_tokens(name, 1, 40, 24, dtype=dtype)
    relevance = assert_relevance(tokens, testing.make_query(1, 2, 24, dtype=dtype))
    assert (relevance[~torch.isfinite(tokens).all(-1)] == 0).all()


def test_negate_one_query_for_all_and_masks():
    tokens = testing.make_tokens("gaussian", 3, 30, 24)
    query = testing.make_query(1, 9, 24)
    plain = assert_relevance(tokens, query)
    negated = assert_relevance(tokens, query, negate=True)
    torch.testing.assert_close(plain, 1 - negated, rtol=0, atol=1e-6)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    assert_relevance(tokens, query.expand(3, -1, -1), mask)
    assert_relevance(tokens, query.expand(3, -1, -1), mask[:, :1].expand(3, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", [32, 33, 100])
def test_many_query_vectors(vectors, dtype):
    """Norms of up to 32 are taken on the way, of more beforehand and all at once."""
    tokens, query = testing.make_tokens("gaussian", 2, 20, 24, dtype=dtype), testing.make_query(2, vectors, 24)
    query[0, 3], query[1, 30] = 0.0, float("nan")
    if dtype != torch.float16:
        query *= torch.logspace(-30, 30, vectors)[None, :, None]
    mask = torch.rand(2, vectors, generator=torch.Generator().manual_seed(0)) < 0.7
    assert_relevance(tokens, query.to(dtype), mask)
    assert_relevance(tokens, query[:1].to(dtype), mask)


def test_norms_of_many_query_vectors_are_not_taken_one_by_one(monkeypatch):
    launched = []
    monkeypatch.setattr(rows, "launch", lambda kernel, programs, *_, **__: launched.append((kernel, programs)))
    query = torch.empty(3, 512, 64, device="meta")
    rows.launch_mean_query(query, None, False, 3)
    assert launched == [(rows.row_kernel, 3 * 512 // rows.BLOCK_ROWS), (rows.mean_query_kernel, 3)]


def test_all_masked_or_constant_gives_ones_and_bad_tokens_zero():
    tokens = testing.make_tokens("gaussian", 1, 9, 8)
    tokens[0, 4, 2] = float("nan")
    expected = torch.ones(1, 9)
    expected[0, 4] = 0
    query = testing.make_query(1, 3, 8)
    for constant in (tokens, tokens[:, :1].expand(1, 9, 8).where(tokens.isfinite(), tokens)):
        mask = torch.full((1, 3), constant is not tokens)
        relevance = launch_query_relevance(constant.to(DEVICE), query.to(DEVICE), mask.to(DEVICE))
        assert torch.equal(relevance.cpu(), expected)


def test_zero_tokens_take_part_with_cosine_zero():
    tokens = torch.tensor([[[1.0, 0], [0, 0], [-1, 0], [0, 5]]], device=DEVICE)
    relevance = launch_query_relevance(tokens, torch.tensor([[[2.0, 0]]], device=DEVICE))
    assert relevance.tolist() == [[1.0, 0.5, 0.0, 0.5]]


def test_empty():
    query = testing.make_query(1, 3, 8, device=DEVICE)
    for shape in ((0, 5, 8), (1, 0, 8)):
        assert launch_query_relevance(torch.empty(shape, device=DEVICE), query).shape == shape[:2]


@pytest.mark.parametrize("spoil", [0.0, float("nan"), float("inf")])
def test_spoilt_query_vectors(spoil):
    query = testing.make_query(1, 3, 24)
    query[0, 1] = spoil
    assert_relevance(testing.make_tokens("gaussian", 1, 30, 24), query)


def test_an_image_alone_has_the_bits_it_has_in_a_batch():
    tokens = testing.make_tokens("photo", 3, 50, 40, device=DEVICE)
    query = testing.make_query(3, 4, 40, device=DEVICE)
    batch = launch_query_relevance(tokens, query)
    assert torch.equal(launch_query_relevance(tokens[1:2], query[1:2])[0], batch[1])
