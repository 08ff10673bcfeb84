"""The Triton bipartite matching and GSP, interpreted on CPU tensors or on the GPU where there is one."""

import pytest
import test_bipartite_match
import test_gsp
import torch
from triton_interpreter import BACKEND, DEVICE, quiet

from script_kernels import reference, testing
from script_kernels.triton.bipartite_match import launch_bipartite_match

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = quiet


def whole_rows(n, d, seed=0):
    """Rows of entries +-1 and equal norms, d a power of four: cosines are exact in fp32, and so are ties."""
    return 1.0 - 2.0 * torch.randint(0, 2, (1, n, d), generator=torch.Generator().manual_seed(seed)).float()


# --- matching


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(2, 5), (63, 70), (100, 33), (577, 24)])
def test_match_against_float64(n, d, dtype):
    tokens = testing.make_tokens("clustered", 1, n, d, dtype=dtype, device=DEVICE)
    test_bipartite_match.assert_match(BACKEND, tokens, testing.gap_threshold(tokens.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_match_of_one_token(dtype):
    outputs = launch_bipartite_match(torch.ones(2, 1, 5, dtype=dtype, device=DEVICE))
    assert [output.tolist() for output in outputs] == [[[0], [0]], [[-1], [-1]], *[[[0], [0]]] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_match_of_adversarial_tokens(name, dtype):
    test_bipartite_match.test_adversarial(BACKEND, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_match_ties_go_to_the_lowest_index(dtype):
    """Of 16 dimensions: best similarities recur in tiles that different programs work on."""
    tokens = whole_rows(300, 16).to(dtype)
    best, match, degree, mean, density = (t.cpu() for t in launch_bipartite_match(tokens.to(DEVICE)))
    expected = reference.bipartite_match(tokens, dtype=torch.float64)
    assert torch.equal(best.double(), expected[0])
    assert torch.equal(match, expected[1])
    assert torch.equal(degree, expected[2])
    torch.testing.assert_close(mean.double(), expected[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(density.double(), expected[4], rtol=0, atol=1e-6)


def test_match_of_strided_tokens_and_of_one_image_alone():
    tokens = testing.make_tokens("photo", 3, 81, 40, device=DEVICE)
    batch = launch_bipartite_match(tokens)
    wide = torch.full((40, 81, 6), float("nan"), device=DEVICE)
    wide[:, :, 1::2] = tokens.permute(2, 1, 0)
    for whole, strided in zip(batch, launch_bipartite_match(wide[:, :, 1::2].permute(2, 1, 0)), strict=True):
        assert torch.equal(whole, strided)
    for whole, alone in zip(batch, launch_bipartite_match(tokens[1:2]), strict=True):
        assert torch.equal(whole[1:2], alone)


def test_empty_batch():
    for output in launch_bipartite_match(torch.empty(0, 9, 4, device=DEVICE)):
        assert output.shape == (0, 5)
    mask, redundancy = BACKEND.gsp(torch.empty(0, 9, 4, device=DEVICE), 7)
    assert mask.shape == redundancy.shape == (0, 9)


# --- pruning


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "keep", "options"),
    [
        (97, 49, {}),
        (96, 96, {}),
        (96, 20, {"rounds": 4}),
        (97, 71, {"rounds": 3, "gamma": -2.0}),
        (64, 48, {"min_degree": 1000, "threshold": 0.5}),
    ],
)
def test_gsp_against_float64(n, keep, options, dtype):
    test_gsp.test_against_float64(BACKEND, "clustered", dtype, n, keep, options)


@pytest.mark.parametrize(
    ("name", "n", "keep"),
    [(name, n, keep) for name in testing.ADVERSARIAL for n, keep in ((1, 1), (2, 1), (63, 40))]
    + [("bad_rows", 577, 433)],
)
def test_gsp_drops_the_largest_of_its_own_scores(name, n, keep):
    test_gsp.test_one_round_drops_the_largest_scores_the_higher_index_first(BACKEND, torch.float32, name, n, keep)


@pytest.mark.parametrize("rounds", [1, 3])
def test_gsp_of_equal_scores_the_lower_index_stays(rounds):
    """Ties within a tile of sources and across tiles that different programs summed."""
    tokens = whole_rows(1, 16).expand(1, 300, 16).to(DEVICE)
    mask, redundancy = BACKEND.gsp(tokens, 170, rounds=rounds)
    expected, scores = reference.gsp(tokens.cpu(), 170, rounds=rounds, dtype=torch.float64)
    assert torch.equal(mask.cpu(), expected)
    torch.testing.assert_close(redundancy.cpu().double(), scores, rtol=1e-5, atol=0)


def test_gsp_of_more_sources_than_a_block():
    tokens = whole_rows(1041, 4).to(DEVICE)
    mask, _ = BACKEND.gsp(tokens, 800, threshold=0.4)
    expected, _ = reference.gsp(tokens.cpu(), 800, threshold=0.4, dtype=torch.float64)
    assert torch.equal(mask.cpu(), expected)


def test_gsp_of_an_image_alone():
    tokens = testing.make_tokens("photo", 3, 80, 40, device=DEVICE)
    mask, redundancy = BACKEND.gsp(tokens, 30, rounds=3)
    alone = BACKEND.gsp(tokens[2:], 30, rounds=3)
    assert torch.equal(alone[0], mask[2:])
    assert torch.equal(alone[1], redundancy[2:])


@pytest.mark.parametrize("gamma", [1e300, -1e300])
def test_parameters_beyond_float32(gamma):
    tokens = torch.tensor([1.0, 0.0], device=BACKEND.device).expand(1, 8, 2)
    mask, redundancy = BACKEND.gsp(tokens, 6, threshold=1.0, gamma=gamma)
    assert not redundancy.isnan().any()
    assert mask[0].tolist() == [True, True, True, True, False, True, False, True]


def test_more_rounds_than_tokens():
    tokens = testing.make_tokens("clustered", 1, 12, 8, device=BACKEND.device)
    mask, redundancy = BACKEND.gsp(tokens, 9, rounds=100)
    wanted, scores = BACKEND.gsp(tokens, 9, rounds=4)
    assert torch.equal(mask, wanted)
    assert torch.equal(redundancy, scores)
