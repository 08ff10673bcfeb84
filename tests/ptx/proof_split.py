"""fp32 tokens multiplied as pairs of TF32 numbers, by tensor cores that truncate as the worst that were measured do.

What L must keep with them: its accuracy at any depth, the same bits for (i, j) and (j, i), a similarity of exactly 1
between equal rows, and bits that do not depend on what else is in the tile.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from ptx import launch
from ptx.launch import interpreted
from script_kernels import testing
from script_kernels.triton.kernels import layout, pairs, rows

slow = pytest.mark.slow
DEEP = 2048  # of ten thousand steps some show in which order their mixed terms were added
EQUAL = [3, 17, 40, 63]  # of 64 tokens: before, between and behind others


def kernel_of(tokens, relevance, seed=7):
    """L and the cosine of each token with itself."""
    with interpreted(seed=seed):
        sizes = layout.Layout.of(tokens)
        clear = torch.ones(1, dtype=torch.int64)
        found = pairs.launch_pairs(tokens, sizes, rows.launch_rows(tokens, sizes), relevance, clear=clear)
    return found.kernel[:, :, : tokens.shape[1]], found.own.view(relevance.shape)


def level(cosines, own):
    """As the greedy steps do it."""
    square = own[:, :, None] * own[:, None, :]
    return cosines / torch.where(square > 0, square, 1).sqrt()


def worst_cosine(tokens):
    """Error of the kernel's cosines, before and after they are levelled."""
    ones = torch.ones(tokens.shape[:2])
    S, own = kernel_of(tokens, ones)
    exact = testing.kernel64(tokens)
    return float((S - exact).abs().max()), float((level(S, own) - exact).abs().max())


def check(tokens):
    assert max(worst_cosine(tokens)) <= 1e-6
    relevance = testing.make_relevance(*tokens.shape[:2])
    L, own = kernel_of(tokens, relevance)
    levelled = level(L, own).diagonal_scatter(L.diagonal(dim1=1, dim2=2), dim1=1, dim2=2)
    indices, _ = torch.ops.script.dpp_map(levelled.contiguous(), 24)
    testing.certify(testing.kernel64(tokens, relevance), indices)


def with_equal_rows(d):
    tokens = testing.make_tokens("gaussian", 1, 64, d)
    tokens[:, EQUAL] = tokens[:, 3:4].clone()
    return tokens


def check_equal_rows(tokens):
    S, own = kernel_of(tokens, torch.ones(tokens.shape[:2]))
    ones = torch.ones(len(EQUAL), len(EQUAL))
    assert torch.equal(S, S.mT)
    assert (own[0, EQUAL] == own[0, 3]).all()
    pair = S[0, EQUAL][:, EQUAL] + torch.diag(own[0, EQUAL] - 1)  # the kernel's diagonal is 1, not the product
    assert torch.equal(pair / (own[0, EQUAL][:, None] * own[0, EQUAL]).sqrt(), ones)
    others = [i for i in range(64) if i not in EQUAL]
    assert torch.equal(S[0, EQUAL][:, others], S[0, 3, others].expand(len(EQUAL), -1))


@pytest.mark.parametrize("d", [pytest.param(1024, marks=slow), pytest.param(4096, marks=slow)])
@pytest.mark.parametrize("kind", testing.KINDS)
def test_certificate(kind, d):
    check(testing.make_tokens(kind, 1, 64, d))


@slow
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
@pytest.mark.parametrize("d", [1024, 4096])
def test_certificate_of_adversarial_tokens(name, d):
    check(testing.adversarial_tokens(name, 1, 64, d))


@pytest.mark.parametrize("d", [160, pytest.param(DEEP, marks=slow)])
def test_equal_rows_stay_equal(d):
    check_equal_rows(with_equal_rows(d))


def test_a_far_row_beside_changes_no_bit():
    """It takes its tile through another loop."""
    tokens = testing.make_tokens("photo", 1, 20, 70)
    ones = torch.ones(1, 20)
    S, _ = kernel_of(tokens, ones)
    tokens[0, 11] *= 2.0**70
    far, _ = kernel_of(tokens, ones)
    assert torch.equal(S, far)


@contextmanager
def planted(old, new):
    """The kernel with one thing of its product of tiles changed."""
    functions = (pairs.dot_pass, pairs.dot_tile, pairs.pair_kernel)
    source = pairs.dot_pass.src
    assert old in source
    with mock.patch.dict(launch.COMPILED, clear=True):
        try:
            pairs.dot_pass._unsafe_update_src(source.replace(old, new))
            for function in functions:
                function.hash = None
            yield
        finally:
            pairs.dot_pass._unsafe_update_src(source)
            for function in functions:
                function.hash = None


def test_tf32_alone_is_caught():
    tokens = testing.make_tokens("photo", 1, 20, 256)
    assert max(worst_cosine(tokens)) < 5e-7
    with planted("acc=b_mixed, ", ""):
        assert min(worst_cosine(tokens)) > 2e-6


@slow
def test_mixed_terms_in_one_chain_are_caught():
    """As Triton would have it: the sum of two products becomes one product that starts from the other."""
    with planted("tl.fma(b_low_high, 1.0, b_high_low)", "b_low_high + b_high_low"), pytest.raises(AssertionError):
        check_equal_rows(with_equal_rows(DEEP))


@slow
def test_one_long_chain_is_caught():
    """The same for the sum over the steps."""
    step = 'tl.fma(tl.dot(b_high_a, b_high_b, acc=b_mixed, input_precision="tf32"), 1.0, b_acc)'
    chain = 'tl.dot(b_high_a, b_high_b, acc=b_acc, input_precision="tf32") + b_mixed'
    tokens = testing.make_tokens("photo", 1, 20, 4096).abs()
    with planted(step, chain):
        assert max(worst_cosine(tokens)) > 2e-6
