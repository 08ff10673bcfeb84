"""dpp_map and qcsp under the step-wise certificate in float64, with their rules for ties, rank and bad tokens."""

import math

import pytest
import torch

from script_kernels import reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bad_tokens(tokens, relevance):
    return (~torch.isfinite(tokens).all(-1) | ~torch.isfinite(relevance.float() ** 2)).cpu()


def assert_greedy(indices, gains, kernel64, order, bad):
    """Every promise on a greedy sequence: the certificate, the gains, the order past the rank."""
    assert (indices.dtype, gains.dtype) == (torch.int64, torch.float32)
    assert indices.shape == gains.shape
    testing.certify(kernel64, indices, gains)
    testing.certify_fallback(indices.cpu(), gains.cpu(), order.cpu(), bad)


def assert_qcsp(backend, tokens, relevance, k):
    tokens, relevance = tokens.to(backend.device), relevance.to(backend.device)
    indices, gains = backend.qcsp(tokens, relevance, k)
    assert indices.shape == (tokens.shape[0], k)
    bad = bad_tokens(tokens, relevance)
    assert_greedy(indices, gains, testing.kernel64(tokens, relevance), relevance, bad)
    return indices, gains


# --- the certificate


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize(("shape", "k"), [((2, 300, 96), 64), ((1, 577, 64), 63), ((3, 33, 40), 33)])
def test_qcsp_is_the_exact_greedy(backend, kind, dtype, weighted, shape, k):
    tokens = testing.make_tokens(kind, *shape, dtype=dtype)
    relevance = testing.make_relevance(*shape[:2]) if weighted else torch.ones(shape[:2])
    assert_qcsp(backend, tokens, relevance, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "cosine"), [(10, 0.6), (14, 0.5), (18, 0.4)])
def test_qcsp_of_wide_tokens_whose_picks_are_nearly_dependent(backend, n, cosine, dtype):
    """Columns of Kahan's matrix, turned at random into rows of 1000: weights grow, and all digits come into it."""
    generator = torch.Generator().manual_seed(n)
    scale = (1 - cosine**2) ** (torch.arange(n).double()[:, None] / 2)
    columns = scale * (torch.eye(n).double() - cosine * torch.ones(n, n).double().triu(1))
    turned = torch.linalg.qr(torch.randn(1000, n, generator=generator).double())[0] @ columns
    assert_qcsp(backend, turned.mT[None].to(dtype), 1 - 0.01 * torch.arange(n).float()[None], n)


@pytest.mark.parametrize(("kind", "weighted"), [("powerlaw", False), ("photo", True)])
def test_qcsp_at_full_size(backend, kind, weighted):
    tokens = testing.make_tokens(kind, 1, 2880, 384)
    relevance = testing.make_relevance(1, 2880) if weighted else torch.ones(1, 2880)
    assert_qcsp(backend, tokens, relevance, 320)


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize(("n", "k"), [(300, 64), (577, 63), (33, 33), (130, 130)])
def test_dpp_map_is_the_exact_greedy(backend, kind, n, k):
    tokens, relevance = testing.make_tokens(kind, 2, n, 64), testing.make_relevance(2, n)
    kernel = testing.kernel64(tokens, relevance).float()
    indices, gains = backend.dpp_map(kernel.to(backend.device), k)
    kernel64 = testing.kernel64_of(kernel)
    order = kernel64.diagonal(dim1=1, dim2=2)
    assert_greedy(indices, gains, kernel64, order, torch.zeros(2, n, dtype=torch.bool))


def test_dpp_map_at_full_size(backend):
    kernel = testing.kernel64(testing.make_tokens("clustered", 1, 2880, 384)).float()
    indices, gains = backend.dpp_map(kernel.to(backend.device), 320)
    kernel64 = testing.kernel64_of(kernel)
    bad = torch.zeros(1, 2880, dtype=torch.bool)
    assert_greedy(indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), bad)


# Beyond 2 million Cholesky entries the CPU takes rows of the kernel another way.
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["powerlaw", "clustered"])
def test_dpp_map_of_a_kernel_far_from_the_caches(kind, columns):
    n, k, rank = 3500, 610, 500
    kernel = testing.kernel64(testing.make_tokens(kind, 1, n, rank), 0.2 + testing.make_relevance(1, n)).float()
    kernel[0, [11, 700], [11, 700]] = math.nan
    kernel64 = testing.kernel64_of(kernel)
    kernel = kernel.mT.contiguous().mT if columns else kernel
    indices, gains = torch.ops.script.dpp_map(kernel, k)
    bad = torch.zeros(1, n, dtype=torch.bool)
    bad[0, [11, 700]] = True
    assert_greedy(indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), bad)
    assert (gains[0, -20:] == 0).all()  # past the rank


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_qcsp_on_adversarial_tokens(backend, dtype, name, weighted):
    """k = 64 of rank 3, zero rows, NaN and Inf rows, ..., and all N tokens."""
    tokens = testing.adversarial_tokens(name, 2, 97, 40, dtype=dtype)
    relevance = testing.make_relevance(2, 97) if weighted else torch.ones(2, 97)
    assert_qcsp(backend, tokens, relevance, 64)
    assert_qcsp(backend, tokens, relevance, 97)


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_relevance_of_any_magnitude(backend, scale):
    tokens, relevance = testing.make_tokens("photo", 1, 80, 64), testing.make_relevance(1, 80)
    assert_qcsp(backend, tokens, relevance * scale, 40)


def test_relevance_that_spans_magnitudes(backend):
    tokens = testing.make_tokens("gaussian", 1, 80, 128)
    assert_qcsp(backend, tokens, 10.0 ** -torch.arange(80.0)[None], 80)


def test_negative_relevance(backend):
    tokens = testing.make_tokens("clustered", 1, 60, 32)
    relevance = testing.make_relevance(1, 60) - 0.5
    assert_qcsp(backend, tokens, relevance, 24)
    assert_qcsp(backend, tokens, relevance, 60)


# --- order past the rank, zero and bad tokens


def test_past_the_rank_by_relevance_then_index_and_bad_tokens_last(backend):
    rows = [[1.0, 0], [2, 0], [0, 1], [0, 3], [0, 0], [math.nan, 0], [1, 1], [1, 0]]
    relevance = torch.tensor([[0.5, 0.5, 1.0, 0.25, 0.5, 0.9, 0.0, -1.0]])
    indices, gains = assert_qcsp(backend, torch.tensor([rows]), relevance, 8)
    assert indices.tolist() == [[2, 7, 0, 1, 4, 3, 6, 5]]
    assert gains.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]


def test_rank_is_exhausted_at_a_millionth(backend):
    """Orthogonal tokens: L is diagonal, and the residuals are the squares of the relevance.

    Past the rank the relevance itself decides: token 4 comes before token 0, of larger residual but negative relevance.
    """
    above, below = 1.01e-3, 0.99e-3
    tokens = torch.eye(5)[None]
    relevance = torch.tensor([[-below, -above, 1.0, -0.5, 0.9 * below]])
    for scale in (1.0, 8.0, 2.0**-10):
        indices, gains = assert_qcsp(backend, tokens, scale * relevance, 5)
        assert indices.tolist() == [[2, 3, 1, 4, 0]]
        expected = torch.tensor([[1.0, 0.25, above**2, 0.0, 0.0]]) * scale**2
        torch.testing.assert_close(gains.cpu(), expected, rtol=1e-5, atol=0)
    kernel = torch.diag(torch.tensor([0.99e-6, 1.01e-6, 1.0])).to(backend.device)[None]
    indices, gains = backend.dpp_map(kernel, 3)
    assert indices.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(gains.cpu(), torch.tensor([[1.0, 1.01e-6, 0.0]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_relevance_that_is_not_finite_makes_a_token_bad(backend, value):
    tokens, relevance = testing.make_tokens("gaussian", 1, 20, 32), testing.make_relevance(1, 20)
    relevance[0, 3] = value
    relevance[0, 7] = 0.0
    indices, _ = assert_qcsp(backend, tokens, relevance, 20)
    assert indices[0, -2:].tolist() == [7, 3]


@pytest.mark.parametrize("value", [1e19, 1.9e19, 1e20, -3e38, 3.4028234663852886e38])
def test_a_finite_relevance_of_any_size_counts(backend, value):
    """Its square may be more than float32 holds: the gain is then the largest float32."""
    largest = torch.finfo(torch.float32).max
    relevance = torch.tensor([[1.0, 2.0, value, 3.0]])
    indices, gains = backend.qcsp(torch.eye(4)[None].to(backend.device), relevance.to(backend.device), 4)
    assert indices.tolist() == [[2, 3, 1, 0]]
    torch.testing.assert_close(gains.cpu(), torch.tensor([[min(value**2, largest), 0.0, 0.0, 0.0]]))
    tokens = testing.make_tokens("gaussian", 1, 40, 64)
    relevance = testing.make_relevance(1, 40) * (value / 4)
    indices, _ = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), 20)
    testing.certify(testing.kernel64(tokens, relevance), indices)


@pytest.mark.parametrize("value", [1e28, 3.4028234663852886e38, -1e30])
def test_the_relevance_of_a_zero_row_does_not_hide_the_others(backend, value):
    """Its L_ii is 0, so the scale of the kernel is that of the other tokens."""
    tokens = testing.make_tokens("gaussian", 1, 40, 16)
    tokens[0, 5] = 0.0
    relevance = testing.make_relevance(1, 40) * 1e-10
    relevance[0, 5] = value
    indices, _ = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), 20)
    testing.certify(testing.kernel64(tokens, relevance), indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 64, 130, 1000, 4096, 65536])
def test_equal_tokens_go_by_relevance(backend, width, dtype):
    """Nothing is left of a token that equals a pick, however long the rows whose products are rounded."""
    generator = torch.Generator().manual_seed(width)
    for rows in (torch.full((1, width), 0.1), torch.randn(1, width, generator=generator) + 3.0):
        n = 300 if width < 65536 else 60
        tokens = rows.to(dtype).expand(1, n, width).contiguous()
        relevance = torch.rand(1, n, generator=generator)
        indices, gains = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), n)
        assert indices[0].tolist() == relevance[0].argsort(descending=True, stable=True).tolist()
        assert bool((gains[0, 1:] == 0).all())
        kept = backend.prune(tokens.to(backend.device), None, n // 4, gsp_drop=0.0)
        assert kept[0].tolist() == list(range(n // 4))


def test_two_kinds_of_equal_tokens_are_two_ranks(backend):
    """The residual of a duplicate vanishes at the second pick as it does at the first."""
    generator = torch.Generator().manual_seed(0)
    for width in (7, 300, 5000):
        kinds = torch.randn(2, width, generator=generator)
        tokens = kinds[torch.arange(200) % 2][None]
        relevance = torch.rand(1, 200, generator=generator) * 0.5 + 0.5
        indices, gains = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), 200)
        assert {int(i) % 2 for i in indices[0, :2]} == {0, 1}
        assert int((gains > 0).sum()) == 2
        rest = [i for i in relevance[0].argsort(descending=True, stable=True).tolist() if i not in indices[0, :2]]
        assert indices[0, 2:].tolist() == rest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dpp_map_with_non_finite_entries(backend, value):
    kernel = testing.kernel64(testing.make_tokens("gaussian", 1, 24, 40), testing.make_relevance(1, 24)).float()
    kernel[0, 3, 3] = kernel[0, 11, 11] = value  # bad tokens
    kernel[0, 5, 8] = kernel[0, 8, 5] = value  # count as 0
    kernel64 = testing.kernel64_of(kernel)
    indices, gains = backend.dpp_map(kernel.to(backend.device), 24)
    bad = torch.zeros(1, 24, dtype=torch.bool)
    bad[0, [3, 11]] = True
    assert_greedy(indices, gains, kernel64, kernel64.diagonal(dim1=1, dim2=2), bad)
    assert indices[0, -2:].tolist() == [3, 11]


def test_dpp_map_clamps_negative_residuals(backend):
    kernel = torch.diag(torch.tensor([-3.0, 2.0, -1.0, 0.0]))[None]
    indices, gains = backend.dpp_map(kernel.to(backend.device), 4)
    assert indices[0, 0] == 1
    assert sorted(indices[0].tolist()) == [0, 1, 2, 3]
    assert gains.tolist() == [[2.0, 0.0, 0.0, 0.0]]


def test_dpp_map_reads_the_row_of_the_pick(backend):
    kernel = torch.tensor([[[4.0, 3.9, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]]])
    indices, gains = backend.dpp_map(kernel.to(backend.device), 3)
    assert indices.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(gains.cpu(), torch.tensor([[4.0, 1.0, 4 - 3.9**2 / 4]]))


# --- ties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 64, 97])
def test_orthonormal_rows_go_in_index_order(backend, dtype, n):
    tokens = (torch.eye(n) * 2.0 ** (torch.arange(n) % 5)[:, None] * (1 - 2 * (torch.arange(n) % 2))[:, None]).to(dtype)
    indices, gains = assert_qcsp(backend, tokens[None], torch.ones(1, n), n)
    assert indices.tolist() == [list(range(n))]
    assert (gains == 1).all()
    indices, _ = backend.dpp_map(torch.eye(n, device=backend.device)[None], n)
    assert indices.tolist() == [list(range(n))]


def scattered_copies(n, distinct, seed):
    """For each of n positions, which of ``distinct`` rows it is a copy of; the last position is a copy of the first."""
    copy_of = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(seed))
    copy_of[-1] = copy_of[0]
    return copy_of


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "distinct"), [(577, 288), (577, 40), (131, 100), (66, 33), (17, 5)])
def test_of_equal_tokens_the_first_is_picked(backend, dtype, weighted, n, distinct):
    """Copies stand anywhere, the ends of any tiling included; up to the rank every pick is the first of its copies."""
    copy_of = scattered_copies(n, distinct, seed=n)
    tokens = testing.make_tokens("gaussian", 3, distinct, 320, dtype=dtype)[:, copy_of]
    tokens = tokens * 2.0 ** (torch.arange(n) % 3)[:, None].to(dtype)
    relevance = testing.make_relevance(3, distinct)[:, copy_of] + 0.01 if weighted else torch.ones(3, n)
    rank = len(copy_of.unique())
    indices, gains = assert_qcsp(backend, tokens, relevance, min(n, rank + 5))
    first = {int((copy_of == c).int().argmax()) for c in copy_of.unique()}
    assert all(set(picks) == first for picks in indices[:, :rank].tolist())
    assert (gains[:, :rank] > 0).all()


@pytest.mark.parametrize(("n", "distinct"), [(577, 288), (577, 40), (66, 9)])
def test_of_equal_kernel_rows_the_first_is_picked(backend, n, distinct):
    copy_of = scattered_copies(n, distinct, seed=n)
    kernel = testing.kernel64(testing.make_tokens("gaussian", 1, distinct, 320)).float()
    kernel = torch.maximum(kernel, kernel.mT)[:, copy_of][:, :, copy_of]
    rank = len(copy_of.unique())
    indices, _ = backend.dpp_map(kernel.to(backend.device), rank)
    first = {int((copy_of == c).int().argmax()) for c in copy_of.unique()}
    assert set(indices[0].tolist()) == first


@pytest.mark.parametrize("low", [0, 1, 63, 64, 287, 575])
def test_tie_at_the_first_pick(backend, low):
    """The last token of 577 is a copy of ``low``, and both are of the largest relevance."""
    tokens, relevance = testing.make_tokens("gaussian", 1, 577, 64), testing.make_relevance(1, 577)
    tokens[0, 576] = tokens[0, low]
    relevance[0, [low, 576]] = 1.5
    indices, _ = assert_qcsp(backend, tokens, relevance, 32)
    assert indices[0, 0] == low
    assert 576 not in indices[0].tolist()


@pytest.mark.parametrize("n", [300, 777])
@pytest.mark.parametrize("seed", range(3))
def test_ties_between_tokens_of_unlike_diagonal_go_to_the_lowest_index(backend, n, seed):
    """Conditioned on the first pick every residual is 1, exactly: 5 - (8 / 4)^2, 2 - (4 / 4)^2 or 1 from the start."""
    generator = torch.Generator().manual_seed(seed)
    pivot, *rest = torch.randperm(n, generator=generator).tolist()
    kernel = torch.eye(n, dtype=torch.float64)
    row = torch.zeros(n, dtype=torch.float64)
    row[rest[: n // 3]], row[rest[n // 3 : n // 2]] = 2.0, 1.0
    kernel += row[:, None] * row
    row[pivot] = 4.0
    kernel[pivot], kernel[:, pivot] = 4 * row, 4 * row
    indices, gains = backend.dpp_map(kernel[None].float().to(backend.device), n)
    assert indices[0].tolist() == [pivot, *sorted(rest)]
    assert gains[0].tolist() == [16.0] + [1.0] * (n - 1)


# --- permutation, shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_permuted_tokens_give_the_permuted_picks(backend, kind, dtype):
    """Under the certificate always; pick by pick where no step is nearly a tie."""
    clear = 0
    for seed in range(8):
        tokens = testing.make_tokens(kind, 1, 100, 64, dtype=dtype, seed=seed)
        relevance = testing.make_relevance(1, 100, seed=seed)
        kernel64 = testing.kernel64(tokens, relevance)
        permutation = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
        straight, _ = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), 24)
        permuted, _ = backend.qcsp(
            tokens[:, permutation].to(backend.device), relevance[:, permutation].to(backend.device), 24
        )
        mapped = permutation[permuted.cpu()]
        testing.certify(kernel64, mapped)
        if testing.greedy_margin(kernel64[0], 24) > 2e-5:
            clear += 1
            assert torch.equal(mapped, straight.cpu())
    assert clear >= 2


def test_clear_cut_sequences_equal_the_oracles(backend):
    checked = 0
    for seed in range(20):
        tokens, relevance = (
            testing.make_tokens("clustered", 1, 64, 48, seed=seed),
            testing.make_relevance(1, 64, seed=seed),
        )
        if testing.greedy_margin(testing.kernel64(tokens, relevance)[0], 20) <= 2e-5:
            continue
        expected, _ = reference.qcsp(tokens, relevance, 20, dtype=torch.float64)
        indices, _ = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), 20)
        assert torch.equal(indices.cpu(), expected)
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (1, 5, 1), (2, 1, 2), (7, 1, 7), (9, 3, 1), (65, 17, 65)])
def test_small_shapes(backend, n, d, k):
    assert_qcsp(backend, testing.make_tokens("gaussian", 2, n, d), testing.make_relevance(2, n) + 0.1, k)


def test_empty_batch(backend):
    indices, gains = backend.qcsp(
        torch.empty(0, 10, 4, device=backend.device), torch.empty(0, 10, device=backend.device), 3
    )
    assert indices.shape == gains.shape == (0, 3)
    assert (indices.dtype, gains.dtype) == (torch.int64, torch.float32)
    indices, gains = backend.dpp_map(torch.empty(0, 10, 10, device=backend.device), 3)
    assert indices.shape == gains.shape == (0, 3)
    assert (indices.dtype, gains.dtype) == (torch.int64, torch.float32)
