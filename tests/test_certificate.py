"""The certificate passes exact greedy sequences and rejects everything else, the three negative controls first."""

import pytest
import torch

from bench import least_work
from script_kernels import reference, testing

N, D, K = 256, 96, 48


def problem(kind: str, weighted: bool, dtype: torch.dtype = torch.float32, n: int = N):
    tokens = testing.make_tokens(kind, 1, n, D, dtype=dtype)
    relevance = testing.make_relevance(1, n) if weighted else torch.ones(1, n)
    return tokens, relevance, testing.kernel64(tokens, relevance)


@pytest.fixture(params=testing.KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def weighted(request):
    return request.param


def test_exact_sequence_passes(kind, weighted):
    tokens, relevance, kernel64 = problem(kind, weighted)
    indices, gains = reference.qcsp(tokens, relevance, K, dtype=torch.float64)
    torch.testing.assert_close(testing.certify(kernel64, indices), gains, rtol=0, atol=1e-12)


def test_rejects_the_released_rule(kind, weighted):
    _, _, kernel64 = problem(kind, weighted)
    with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
        testing.certify(kernel64, reference.released_map(kernel64, K))


def test_rejects_a_kernel_stored_in_bfloat16(kind, weighted):
    tokens, relevance, kernel64 = problem(kind, weighted)
    stored = reference.kernel_matrix(tokens, relevance).bfloat16().double()
    with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
        testing.certify(kernel64, reference.dpp_map(stored, K + 16, dtype=torch.float64)[0])


def test_rejects_halves_selected_apart(kind, weighted):
    tokens, relevance, kernel64 = problem(kind, weighted)
    h = N // 2
    first = reference.qcsp(tokens[:, :h], relevance[:, :h], K // 2)[0]
    second = h + reference.qcsp(tokens[:, h:], relevance[:, h:], K // 2)[0]
    interleaved = torch.stack([first, second], 2).flatten(1)
    for sequence in (torch.cat([first, second], 1), interleaved):
        with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
            testing.certify(kernel64, sequence)


def test_rejects_tokens_normalised_in_bfloat16(kind, weighted):
    tokens, relevance, kernel64 = problem(kind, weighted, torch.bfloat16, n=512)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    assert unit.dtype == torch.bfloat16
    kernel = unit.double() @ unit.double().mT * (relevance[:, :, None] * relevance[:, None, :])
    with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
        testing.certify(kernel64, reference.dpp_map(kernel, 128, dtype=torch.float64)[0])


def test_rejects_tensor_float_32(kind):
    """Products of float32 inputs cut to the 10 mantissa bits of TF32."""
    tokens, relevance, kernel64 = problem(kind, True, n=1024)
    cut = (tokens.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    scale = relevance / tokens.double().norm(dim=-1)
    kernel = cut @ cut.mT * (scale[:, :, None] * scale[:, None, :])
    kernel.diagonal(dim1=1, dim2=2).copy_(relevance.double() ** 2)
    with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
        testing.certify(kernel64, reference.dpp_map(kernel, 256, dtype=torch.float64)[0])


@pytest.mark.parametrize(("lead", "accepted"), [(5e-6, True), (2e-5, False)])
def test_tolerance_is_a_share_of_the_largest_diagonal_entry(lead, accepted):
    kernel64 = 100 * torch.diag(torch.tensor([1.0, 0.5 - lead, 0.5], dtype=torch.float64))
    sequence = torch.tensor([0, 1, 2])
    if accepted:
        gains = testing.certify(kernel64, sequence)
        torch.testing.assert_close(gains, kernel64.diagonal())
    else:
        with pytest.raises(AssertionError, match="step 1: picked token 1 of residual"):
            testing.certify(kernel64, sequence)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([0, 1, 0], "image 0, step 2: token 0 was already selected"),
        ([0, 4], r"image 0, step 1: index 4 is not in \[0, 4\)"),
        ([0, -1], r"image 0, step 1: index -1 is not in \[0, 4\)"),
    ],
)
def test_rejects_repeated_and_outlying_indices(sequence, message):
    with pytest.raises(AssertionError, match=message):
        testing.certify(torch.eye(4, dtype=torch.float64)[None], torch.tensor([sequence]))


def test_names_the_image():
    kernel64 = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).expand(3, 2, 2)
    with pytest.raises(AssertionError, match="image 2, step 0: picked token 0"):
        testing.certify(kernel64, torch.tensor([[1, 0], [1, 0], [0, 1]]))


def test_insists_on_types():
    with pytest.raises(AssertionError, match="float64"):
        testing.certify(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(AssertionError, match="int64"):
        testing.certify(torch.eye(2, dtype=torch.float64), torch.tensor([0, 1], dtype=torch.int32))


def test_past_the_rank_any_order_passes_but_fallback_order_does_not():
    x = (
        torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).permute(1, 0, 2).repeat(1, 3, 1)
    )  # tokens 0, 2, 4 are equal, and 1, 3, 5
    relevance = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    gains = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    bad = torch.zeros(1, 6, dtype=torch.bool)
    kernel64 = testing.kernel64(x, relevance)
    in_order, out_of_order = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 3, 2]])
    for sequence in (in_order, out_of_order):
        testing.certify(kernel64, sequence)
    testing.certify_fallback(in_order, gains, relevance, bad)
    with pytest.raises(AssertionError, match=r"past the rank \(step 2\) expected \[2, 3\], got \[3, 2\]"):
        testing.certify_fallback(out_of_order, gains, relevance, bad)
    with pytest.raises(AssertionError, match="a gain past the rank"):
        testing.certify_fallback(in_order, torch.tensor([[1.0, 1.0, 0.0, 0.5]]), relevance, bad)
    order = torch.tensor([[1.0, 1.0, 0.2, 0.7, 0.9, 0.9]])
    bad[0, 4] = True
    testing.certify_fallback(torch.tensor([[0, 1, 5, 3, 2, 4]]), torch.tensor([[1.0, 1, 0, 0, 0, 0]]), order, bad)


def test_kernel64_handles_zero_and_bad_rows():
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0], [6.0, 8.0], [3e38, -3e38], [1e-45, 0.0]]])
    relevance = torch.tensor([[1.0, 1.0, 1.0, 0.5, float("inf"), 1.0]])
    kernel = testing.kernel64(tokens, relevance)[0]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[0, 0], expected[3, 3], expected[0, 3], expected[3, 0] = 1.0, 0.25, 0.5, 0.5
    expected[5, 5], expected[0, 5], expected[5, 0], expected[3, 5], expected[5, 3] = 1.0, 0.6, 0.6, 0.3, 0.3
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-15)


def test_greedy_margin():
    kernel64 = torch.diag(torch.tensor([4.0, 1.0, 3.0, 2.8], dtype=torch.float64))
    assert testing.greedy_margin(kernel64, 1) == pytest.approx(1 / 4)
    assert testing.greedy_margin(kernel64, 4) == pytest.approx(0.2 / 4)


def nearly_dependent(n: int = 12, cosine: float = 0.6):
    """Tokens (1, n, n): the columns of Kahan's matrix, whose residuals fall slowly and whose weights grow as 1.6^t."""
    scale = (1 - cosine**2) ** (torch.arange(n).double()[:, None] / 2)
    return (scale * (torch.eye(n).double() - cosine * torch.ones(n, n).triu(1))).mT[None].float()


def test_what_no_float32_kernel_tells_is_not_asked():
    """K rounded once to float32 has gains further off than 1e-5, though computed in float64; 32 roundings are seen."""
    tokens, relevance = nearly_dependent(), 1 - 0.01 * torch.arange(12.0)[None]
    kernel64 = testing.kernel64(tokens, relevance)
    indices, gains = reference.dpp_map(kernel64.float().double(), 12, dtype=torch.float64)
    assert (testing.certify(kernel64, indices, gains) - gains).abs().max() > 2e-5
    for seed in range(20):
        signs = 2.0 * torch.randint(0, 2, (12, 12), generator=torch.Generator().manual_seed(seed)) - 1
        noise = 2.0**-17 * (signs.triu() + signs.triu(1).mT)
        other = reference.dpp_map(kernel64 + noise, 12, dtype=torch.float64)
        with pytest.raises(AssertionError, match=r"a gain of|picked token \d+ of residual"):
            testing.certify(kernel64, *other)


def test_rejects_a_gain_that_is_not_the_residual():
    kernel64 = testing.kernel64(*problem("gaussian", True)[:2])
    indices, gains = reference.dpp_map(kernel64, K, dtype=torch.float64)
    testing.certify(kernel64, indices, gains)
    gains[0, 7] += 2e-5 * kernel64.diagonal(dim1=1, dim2=2).max()
    with pytest.raises(AssertionError, match="image 0, step 7: a gain of"):
        testing.certify(kernel64, indices, gains)


def test_work_counts():
    assert least_work.bipartite_match_work(2, 5, 7, 4).flops == 2 * (2 * 3 * 2 * 7 + 2 * 5 * 7)
    assert least_work.gsp_work(1, 9, 3, 4, 2, 4).flops == sum(
        least_work.bipartite_match_work(1, n, 3, 4).flops for n in (9, 6)
    )
    loop = sum(2 * t * 11 + 4 * 11 for t in range(6))
    assert least_work.dpp_map_work(3, 11, 6).flops == 3 * loop
    assert least_work.nearest_work(3, 11, 5, 6, 4).flops == 3 * 2 * 11 * (5 * (6 + 1) + 2 * 6)
    whole = least_work.prune_work(2, 12, 4, 3, 2, Q=5)
    stages = [
        least_work.gsp_work(2, 12, 4, 9, 1, 2),
        least_work.qcsp_work(2, 12, 4, 6, 2),
        least_work.mask_intersect_work(2, 12, 6, 3),
        least_work.query_relevance_work(2, 12, 4, 5, 2),
    ]
    assert whole == (sum(w.flops for w in stages), sum(w.bytes for w in stages))
