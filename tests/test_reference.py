"""The oracles against definitions written another way: plain loops, determinants, cases worked by hand."""

import itertools
import math

import pytest
import torch

from script_kernels import reference, testing

F64 = torch.float64


def cos(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def test_kernel_matrix_equals_the_certificates_kernel():
    tokens, relevance = testing.make_tokens("photo", 2, 50, 24), testing.make_relevance(2, 50)
    expected = testing.kernel64(tokens, relevance)
    torch.testing.assert_close(reference.kernel_matrix(tokens, relevance, dtype=F64), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        reference.kernel_matrix(tokens, relevance), expected.float(), rtol=0, atol=2e-6, check_dtype=True
    )


@pytest.mark.parametrize("name", testing.ADVERSARIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_matrix_on_adversarial_tokens(name, dtype):
    tokens, relevance = testing.adversarial_tokens(name, 2, 40, 16, dtype=dtype), testing.make_relevance(2, 40)
    kernel = reference.kernel_matrix(tokens, relevance, dtype=F64)
    torch.testing.assert_close(kernel, testing.kernel64(tokens, relevance), rtol=0, atol=1e-14)
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    zero = ~torch.isfinite(tokens).all(-1) | (tokens == 0).all(-1)
    assert torch.equal(diagonal, (relevance.double() ** 2).masked_fill(zero, 0.0))


def test_query_relevance_in_plain_loops():
    tokens, query = testing.make_tokens("gaussian", 2, 9, 5), testing.make_query(2, 4, 5)
    tokens[0, 3], tokens[1, 0], query[0, 1], query[1, 2, 0] = 0.0, math.nan, 0.0, math.inf
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    for negate in (False, True):
        expected = torch.zeros(2, 9, dtype=F64)
        for b in range(2):
            score = {}
            for i in range(9):
                if not torch.isfinite(tokens[b, i]).all():
                    continue
                cosines = []
                for q in range(4):
                    usable = bool(torch.isfinite(query[b, q]).all() and query[b, q].any() and tokens[b, i].any())
                    if mask[b, q]:
                        cosines.append(cos(tokens[b, i], query[b, q]) if usable else 0.0)
                score[i] = sum(cosines) / len(cosines) * (-1 if negate else 1)
            low, high = min(score.values()), max(score.values())
            for i, s in score.items():
                expected[b, i] = (s - low) / (high - low)
        relevance = reference.query_relevance(tokens, query, mask, negate=negate, dtype=F64)
        torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-14)
        assert relevance[1, 0] == 0


def test_bipartite_match_in_plain_loops():
    tokens = testing.make_tokens("clustered", 1, 31, 12)
    best, match, degree, mean, density = reference.bipartite_match(tokens, 0.2, dtype=F64)
    for s, i in enumerate(range(0, 31, 2)):
        similarity = {j: cos(tokens[0, i], tokens[0, j]) for j in range(1, 31, 2)}
        near = [v for v in similarity.values() if v >= 0.2]
        assert match[0, s] == max(similarity, key=similarity.__getitem__)
        assert best[0, s].item() == pytest.approx(max(similarity.values()), abs=1e-14)
        assert degree[0, s] == len(near)
        assert mean[0, s].item() == pytest.approx(sum(near) / len(near) if near else 0.0, abs=1e-14)
        assert density[0, s].item() == pytest.approx(sum(similarity.values()) / len(similarity), abs=1e-14)
    assert (match.dtype, degree.dtype) == (torch.int32, torch.int32)


def test_gsp_by_hand():
    """Six unit vectors in the plane. Sources 0, 2, 4 face destinations 1, 3, 5."""
    degrees = torch.tensor([0.0, 0.0, 60.0, 60.0, 180.0, 90.0], dtype=F64)
    angle = degrees * math.pi / 180
    tokens = torch.stack([angle.cos(), angle.sin()], 1).float()[None]
    c30, c60 = math.cos(math.pi / 6), 0.5
    # Source 0 has cosines 1, c60, 0 with the destinations; source 2 has c60, 1, c30; source 4 has -1, -c60, 0.
    rho0 = 2 * math.exp(1.5 * ((1 + c60) / 2 - 0.3))
    rho2 = 3 * math.exp(1.5 * ((c60 + 1 + c30) / 3 - 0.3))
    rho4 = 0.5 * (-1 - c60) / 3
    mask, redundancy = reference.gsp(tokens, 5, threshold=0.3, gamma=1.5, min_degree=2, dtype=F64)
    expected = torch.tensor([[rho0, 0, rho2, 0, rho4, 0]], dtype=F64)
    torch.testing.assert_close(redundancy, expected, rtol=0, atol=1e-6)
    assert mask.tolist() == [[True, True, False, True, True, True]]
    # With min_degree 3, source 0 falls to half its score plus half its density.
    _, redundancy = reference.gsp(tokens, 5, threshold=0.3, gamma=1.5, min_degree=3, dtype=F64)
    assert redundancy[0, 0].item() == pytest.approx(rho0 / 2 + 0.5 * (1 + c60) / 3, abs=1e-6)
    # A second round splits what is left anew: of 0, 1, 3, 4, 5 the sources are now 0, 3 and 5.
    mask, redundancy = reference.gsp(tokens, 4, threshold=0.3, gamma=1.5, min_degree=2, rounds=2, dtype=F64)
    assert mask.tolist() == [[False, True, False, True, True, True]]
    rho0 = 0.5 * 1 * math.exp(1.5 * (1 - 0.3)) + 0.5 * (1 - 1) / 2
    rho3 = 0.5 * 1 * math.exp(1.5 * (c60 - 0.3)) + 0.5 * (c60 - c60) / 2
    rho5 = 0.0
    expected = torch.tensor([[rho0, 0, rho2, rho3, rho4, rho5]], dtype=F64)
    torch.testing.assert_close(redundancy, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "keep", "rounds", "quotas"),
    [
        (10, 10, 1, [0]),
        (10, 5, 1, [5]),
        (9, 4, 1, [5]),
        (10, 4, 1, None),
        (10, 4, 2, [3, 3]),
        (10, 3, 3, [3, 2, 2]),
        (100, 10, 1, None),
        (100, 10, 4, None),
        (1, 1, 3, [0, 0, 0]),
        (2, 1, 1, [1]),
    ],
)
def test_gsp_quotas(n, keep, rounds, quotas):
    assert reference.gsp_quotas(n, keep, rounds) == quotas


@pytest.mark.parametrize(("n", "keep", "rounds"), [(100, 10, 1), (100, 10, 4), (9, 1, 1)])
def test_gsp_error_names_the_rounds_that_work(n, keep, rounds):
    tokens = testing.make_tokens("gaussian", 1, n, 4)
    with pytest.raises(
        ValueError, match=rf"keep: {keep} of N = {n} .* rounds = {rounds} .*needs rounds >= \d+"
    ) as error:
        reference.gsp(tokens, keep, rounds=rounds)
    enough = int(str(error.value).rsplit(" ", 1)[1])
    assert reference.gsp(tokens, keep, rounds=enough)[0].sum() == keep
    with pytest.raises(ValueError, match=f"needs rounds >= {enough}"):
        reference.gsp(tokens, keep, rounds=enough - 1)


def test_greedy_maximises_the_determinant_step_by_step():
    """The definition: each pick maximises the determinant of the chosen block, and gains are the ratios of those."""
    tokens, relevance = testing.make_tokens("powerlaw", 1, 24, 16), testing.make_relevance(1, 24)
    kernel = testing.kernel64(tokens, relevance)[0]
    indices, gains = reference.qcsp(tokens, relevance, 8, dtype=F64)
    chosen, det = [], 1.0
    for pick, gain in zip(indices[0].tolist(), gains[0].tolist(), strict=True):
        dets = {i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in range(24) if i not in chosen}
        assert pick == max(dets, key=dets.__getitem__)
        assert gain == pytest.approx(dets[pick] / det, rel=1e-6)
        chosen.append(pick)
        det = dets[pick]


def test_greedy_past_the_rank_goes_by_relevance_then_index_and_bad_tokens_last():
    tokens = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3], [0, 0], [math.nan, 0], [1, 1], [1, 0]])[None]
    relevance = torch.tensor([[0.5, 0.5, 1.0, 0.25, 0.5, 0.9, 0.0, -1.0]])
    indices, gains = reference.qcsp(tokens, relevance, 8)
    # Token 2 first (gain 1, lower index than 7), then 7 (gain 1); then the rank 2 is exhausted.
    assert indices.tolist() == [[2, 7, 0, 1, 4, 3, 6, 5]]
    assert gains.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]


def test_greedy_reads_the_row_of_the_pick():
    kernel = torch.tensor([[[4.0, 3.9, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]]])
    indices, gains = reference.dpp_map(kernel, 3)
    assert indices.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(gains, torch.tensor([[4.0, 1.0, 4 - 3.9**2 / 4]]))


def test_exact_duplicates_tie_wherever_they_stand():
    generator = torch.Generator().manual_seed(0)
    for n in (33, 64, 257, 577):
        for dtype in (torch.float32, F64):
            tokens = torch.randn(1, n, 48, generator=generator)
            tokens[0, n - 1] = tokens[0, 5]
            tokens[0, n // 2] = 2 * tokens[0, 6]
            kernel = reference.kernel_matrix(tokens, torch.ones(1, n), dtype=dtype)[0]
            for low, high in ((5, n - 1), (6, n // 2)):
                assert torch.equal(kernel[low], kernel[high])
                assert torch.equal(kernel[:, low], kernel[:, high])
            order = reference.qcsp(tokens, torch.ones(1, n), n, dtype=dtype)[0][0].tolist()
            assert order.index(5) < order.index(n - 1)
            assert order.index(6) < order.index(n // 2)


def test_restrict_is_qcsp_on_the_survivors():
    tokens, query = testing.make_tokens("clustered", 1, 60, 24), testing.make_query(1, 3, 24)
    mask, _ = reference.gsp(tokens, 45, dtype=F64)
    survivors = mask[0].nonzero()[:, 0]
    relevance = reference.query_relevance(tokens, query, dtype=F64)
    local, _ = reference.qcsp(tokens[:, survivors], relevance[:, survivors], 12, dtype=F64)
    expected = survivors[local[0]].sort().values
    kept = reference.prune(tokens, query, 12, combine="restrict", dtype=F64)
    assert torch.equal(kept[0], expected)


def test_restrict_goes_on_over_the_rest_conditioned_on_the_survivors():
    """Sources 0 and 2 are duplicates and are dropped; of the rest, the one unlike all survivors comes first."""
    e = torch.eye(4)
    tokens = torch.stack([e[0] + 0.1 * e[3], e[0], e[1] + 0.01 * e[3], e[1], e[2], e[2]])[None]
    mask, _ = reference.gsp(tokens, 3, min_degree=0)
    assert mask.tolist() == [[False, True, False, True, False, True]]
    for keep, expected in ((3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5])):
        assert reference.prune(tokens, None, keep, gsp_drop=0.5, min_degree=0, combine="restrict").tolist() == [
            expected
        ]


def test_bad_aligned_rows_are_picked_last():
    tokens, query = testing.make_tokens("gaussian", 1, 12, 6), testing.make_query(1, 1, 6)
    aligned = testing.make_tokens("gaussian", 1, 12, 6, seed=1)
    aligned[0, 4, 2] = math.nan
    for combine in ("intersect", "restrict"):
        kept = reference.prune(tokens, query, 11, aligned=aligned, combine=combine, gsp_drop=0.0)
        assert kept.tolist() == [[i for i in range(12) if i != 4]]


def test_prune_varlen_is_prune_per_segment():
    tokens = testing.make_tokens("gaussian", 1, 30, 8)[0]
    query = testing.make_query(3, 2, 8)
    cu_seqlens = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    kept = reference.prune_varlen(tokens, cu_seqlens, query, [4, 0, 7])
    first, last = reference.prune(tokens[None, :11], query[:1], 4), reference.prune(tokens[None, 11:], query[2:], 7)
    assert kept.tolist() == first[0].tolist() + (last[0] + 11).tolist()


@pytest.mark.parametrize("kind", testing.KINDS)
class TestReleasedRule:
    def test_update_is_that_of_the_raw_column(self, kind):
        kernel = testing.kernel64(testing.make_tokens(kind, 1, 40, 16), testing.make_relevance(1, 40))[0]
        d = [float(kernel[i, i]) for i in range(40)]
        expected = []
        for _ in range(30):
            j = max((i for i in range(40) if i not in expected), key=lambda i: (d[i], -i))
            if d[j] > 0:
                d = [d[i] - (float(kernel[i, j]) / (math.sqrt(d[j]) + 1e-6)) ** 2 for i in range(40)]
            expected.append(j)
        assert reference.released_map(kernel[None], 30)[0].tolist() == expected
        assert max(d[i] for i in range(40) if i not in expected) <= 0 < float(kernel.diagonal().min())

    def test_graph_stage_has_no_effect(self, kind):
        tokens, relevance = testing.make_tokens(kind, 2, 80, 16), testing.make_relevance(2, 80)
        kept = [
            reference.released_prune(tokens, relevance, 20, threshold=t, gamma=g, min_degree=d)
            for t, g, d in itertools.product((-1.0, 0.2, 0.9), (0.0, 3.0), (0, 50))
        ]
        selection = reference.released_map(reference.kernel_matrix(tokens, relevance), 20).sort(1).values
        assert all(torch.equal(k, selection) for k in kept)

    def test_log_det_is_below_the_exact_greedys(self, kind):
        tokens, relevance = testing.make_tokens(kind, 2, 200, 64), testing.make_relevance(2, 200)
        kernel = testing.kernel64(tokens, relevance)

        def log_det(b: int, indices: torch.Tensor) -> float:
            return float(torch.logdet(kernel[b][indices[b]][:, indices[b]]))

        exact = reference.qcsp(tokens, relevance, 32)[0]
        released = reference.released_prune(tokens, relevance, 32)
        for b in range(2):
            assert log_det(b, released) < log_det(b, exact) - 0.5


def test_dtype_is_the_type_of_the_results():
    tokens = testing.make_tokens("gaussian", 1, 10, 4, dtype=torch.float16)
    query = testing.make_query(1, 2, 4, dtype=torch.float16)
    for dtype in (torch.float32, F64):
        assert reference.query_relevance(tokens, query, dtype=dtype).dtype == dtype
        assert reference.gsp(tokens, 7, dtype=dtype)[1].dtype == dtype
        assert reference.qcsp(tokens, torch.ones(1, 10), 3, dtype=dtype)[1].dtype == dtype
        assert reference.bipartite_match(tokens, dtype=dtype)[0].dtype == dtype


def test_nothing_requires_grad():
    tokens, query = testing.make_tokens("gaussian", 1, 10, 4).requires_grad_(), testing.make_query(1, 2, 4)
    assert not reference.query_relevance(tokens, query).requires_grad
    assert not reference.qcsp(tokens, torch.ones(1, 10), 3)[1].requires_grad
    assert not reference.gsp(tokens, 7)[1].requires_grad
