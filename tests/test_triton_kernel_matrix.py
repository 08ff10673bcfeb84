"""The Triton conditional kernel: on CPU tensors under Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch
from triton_interpreter import DEVICE, quiet

from script_kernels import testing
from script_kernels.triton.kernels.layout import Layout
from script_kernels.triton.kernels.pairs import launch_pairs
from script_kernels.triton.kernels.rows import launch_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = quiet


def launch_kernel_matrix(tokens, relevance, cu_seqlens=None, **options):
    """L alone, from tokens and their relevance."""
    layout = Layout.of(tokens, cu_seqlens)
    kernel = launch_pairs(tokens, layout, launch_rows(tokens, layout), relevance, **options)[1]
    return kernel[..., : options.get("width", layout.n)]


def assert_kernel_matrix(tokens, relevance):
    kernel = launch_kernel_matrix(tokens.to(DEVICE), relevance.to(DEVICE)).cpu()
    exact = testing.kernel64(tokens, relevance)
    scale = exact.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    assert ((kernel.double() - exact).abs() <= 1e-6 * scale).all()
    assert torch.equal(kernel, kernel.mT)
    square = torch.where(exact.diagonal(dim1=1, dim2=2) > 0, relevance * relevance, 0.0)
    assert torch.equal(kernel.diagonal(dim1=1, dim2=2), square)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (63, 40), (64, 64), (100, 1100)])
def test_kernel_matrix_is_accurate_symmetric_and_exact_on_its_diagonal(dtype, n, d):
    assert_kernel_matrix(testing.make_tokens("gaussian", 2, n, d, dtype=dtype), testing.make_relevance(2, n) - 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_kernel_matrix_of_adversarial_tokens(dtype, name):
    tokens, relevance = testing.adversarial_tokens(name, 1, 70, 40, dtype=dtype), testing.make_relevance(1, 70)
    kernel = assert_kernel_matrix(tokens, relevance)
    zero = ~torch.isfinite(tokens).all(-1) | (tokens == 0).all(-1)
    assert (kernel[zero] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_relevance_without_a_finite_square_gives_a_zero_row(value):
    tokens, relevance = testing.make_tokens("gaussian", 1, 20, 32), testing.make_relevance(1, 20)
    relevance[0, 3] = value
    kernel = launch_kernel_matrix(tokens.to(DEVICE), relevance.to(DEVICE)).cpu()
    assert (kernel[0, 3] == 0).all()
    assert (kernel[0, :, 3] == 0).all()
    assert torch.isfinite(kernel).all()


def test_large_relevance_does_not_overflow_beside_small_tokens():
    """r_i / |x_i| alone would overflow."""
    tokens = testing.make_tokens("gaussian", 1, 20, 8) * 2.0**-38
    relevance = torch.full((1, 20), 1e19)
    assert_kernel_matrix(tokens, relevance)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_tokens(layout):
    tokens, relevance = testing.make_tokens("gaussian", 3, 33, 20), testing.make_relevance(3, 33)
    if layout == "sliced":
        strided = torch.cat([tokens, tokens], 1)[:, :33]
    elif layout == "transposed":
        strided = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        strided = tokens[:1].expand(3, -1, -1)
    contiguous = strided.contiguous()
    assert not strided.is_contiguous()
    got = launch_kernel_matrix(strided.to(DEVICE), relevance.to(DEVICE))
    assert torch.equal(got, launch_kernel_matrix(contiguous.to(DEVICE), relevance.to(DEVICE)))


def test_an_image_alone_and_in_a_batch_are_the_same():
    tokens, relevance = testing.make_tokens("photo", 5, 70, 48, dtype=torch.bfloat16), testing.make_relevance(5, 70)
    batch = launch_kernel_matrix(tokens.to(DEVICE), relevance.to(DEVICE))
    alone = launch_kernel_matrix(tokens[3:4].to(DEVICE), relevance[3:4].to(DEVICE))
    assert torch.equal(batch[3:4], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_segments_equal_dense_images(dtype):
    lengths = [70, 0, 1, 33, 90, 2]
    tokens = testing.make_tokens("clustered", 1, sum(lengths), 40, dtype=dtype)[0].to(DEVICE)
    relevance = testing.make_relevance(1, sum(lengths))[0].to(DEVICE)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    clear = torch.full((1000,), -1, dtype=torch.int64, device=DEVICE)
    packed = launch_kernel_matrix(tokens, relevance, cu_seqlens=cu_seqlens, width=80, clear=clear)
    assert packed.shape == (sum(lengths), 80)
    assert (clear == 0).all()
    for start, n in zip(cu_seqlens.tolist(), lengths, strict=False):
        if 0 < n <= 80:  # a segment of 90 tokens is left out
            dense = launch_kernel_matrix(tokens[None, start : start + n], relevance[None, start : start + n])
            assert torch.equal(packed[start : start + n, :n], dense[0])


def test_a_clear_of_less_than_one_block_stays_inside():
    buffer = torch.full((40,), -1, dtype=torch.int64, device=DEVICE)
    tokens, relevance = testing.make_tokens("gaussian", 1, 5, 8), testing.make_relevance(1, 5)
    launch_kernel_matrix(tokens.to(DEVICE), relevance.to(DEVICE), clear=buffer[8:20])
    assert (buffer[8:20] == 0).all()
    assert (buffer[:8] == -1).all()
    assert (buffer[20:] == -1).all()
