"""The PTX of every kernel, at small odd shapes, held to what the tests of the ops ask for.

CTAs and warps run in an order drawn at random; every access is checked for races, stale reads and bounds.
"""

import pytest
import test_bipartite_match
import test_dpp
import test_gsp
import test_prune
import test_prune_varlen
import test_relevance
import torch
import triton
from triton.compiler import ASTSource

from ptx.launch import PtxBackend, interpreted
from ptx.parse import parse
from ptx.program import Program
from script_kernels import reference, targets, testing
from script_kernels.triton.kernels import layout, pairs, rows
from script_kernels.triton.qcsp import launch_qcsp

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]
slow = pytest.mark.slow
first_only = [pytest.param(FP32, marks=slow), BF16, pytest.param(FP16, marks=slow)]


@pytest.mark.parametrize("dtype", first_only)
@pytest.mark.parametrize("vectors", [3, pytest.param(rows.QUERY_SERIAL + 1, marks=slow)])
def test_relevance_of_the_query(dtype, vectors):
    tokens, query = (
        testing.make_tokens("clustered", 2, 13, 37, dtype=dtype),
        testing.make_query(1, vectors, 37, dtype=dtype),
    )
    mask = torch.arange(vectors).expand(2, -1) % 3 < 2
    test_relevance.assert_relevance(PtxBackend(seed=1), tokens, query)
    test_relevance.assert_relevance(PtxBackend(seed=2), tokens, query, mask)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_relevance_of_adversarial_tokens(dtype, name):
    test_relevance.test_extreme_magnitudes(PtxBackend(seed=3), dtype, name)


@pytest.mark.parametrize("dtype", first_only)
@pytest.mark.parametrize(
    ("n", "d"), [(21, 70), *(pytest.param(n, d, marks=slow) for n, d in ((2, 5), (63, 70), (140, 33)))]
)
def test_match(dtype, n, d):
    """Rows of 70 and 33 are not whole multiples of anything: copies to shared memory are masked."""
    tokens = testing.make_tokens("clustered", 2, n, d, dtype=dtype)
    test_bipartite_match.assert_match(PtxBackend(seed=n), tokens, testing.gap_threshold(tokens))


@slow
def test_match_of_one_token():
    test_bipartite_match.test_one_token(PtxBackend(seed=1))


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_match_of_whole_chunks(dtype):
    """D a multiple of 16: vectors of 16 bytes, and a pipeline of three stages that wraps."""
    tokens = testing.make_tokens("clustered", 1, 70, 320, dtype=dtype)
    test_bipartite_match.assert_match(PtxBackend(seed=5), tokens, testing.gap_threshold(tokens))


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"rounds": 2, "min_degree": 2}, {}])
def test_graph_pruning(dtype, options):
    test_gsp.test_against_float64(PtxBackend(seed=6), "clustered", dtype, 61, 40, options)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [40, 1056])
def test_kernel_matrix(dtype, d):
    """Symmetric bit for bit, with r^2 on the diagonal; 1056 columns are two chains."""
    tokens, relevance = testing.make_tokens("photo", 1, 77, d, dtype=dtype), testing.make_relevance(1, 77)
    with interpreted(seed=7):
        sizes = layout.Layout.of(tokens)
        found = rows.launch_rows(tokens, sizes)
        L = pairs.launch_pairs(tokens, sizes, found, relevance, clear=torch.ones(70, dtype=torch.int64)).kernel[
            :, :, :77
        ]
    assert torch.equal(L, L.mT)
    assert torch.equal(L.diagonal(dim1=1, dim2=2), relevance * relevance)
    torch.testing.assert_close(L.double(), testing.kernel64(tokens, relevance), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", first_only)
@pytest.mark.parametrize(
    "route",
    [
        pytest.param({"columns": 256}, marks=slow),
        pytest.param({"columns": 1024}, marks=slow),
        pytest.param({"columns": 2048}, marks=slow),
        {"columns": 64},
        pytest.param({"columns": 2048, "matrix_free": True}, marks=slow),
        pytest.param({"columns": 512, "matrix_free": True}, marks=slow),
        pytest.param({"columns": 128, "matrix_free": True}, marks=slow),
    ],
    ids=lambda route: "-".join(map(str, route.values())),
)
def test_qcsp(dtype, route):
    tokens, relevance = testing.make_tokens("photo", 1, 131, 43, dtype=dtype), testing.make_relevance(1, 131)
    tokens[0, 70, 3] = float("nan")
    indices, gains = PtxBackend(seed=8).qcsp(tokens, relevance, 19, **route)
    bad = test_dpp.bad_tokens(tokens, relevance)
    test_dpp.assert_greedy(indices, gains, testing.kernel64(tokens, relevance), relevance, bad)


def test_qcsp_of_two_arrays_of_columns():
    """A program of 512 and 128 columns, both in use."""
    tokens, relevance = testing.make_tokens("photo", 1, 530, 16, dtype=BF16), testing.make_relevance(1, 530)
    relevance[0, 510:520] += 1
    indices, gains = PtxBackend(seed=9).qcsp(tokens, relevance, 7, columns=640)
    none = torch.zeros(1, 530, dtype=torch.bool)
    test_dpp.assert_greedy(indices, gains, testing.kernel64(tokens, relevance), relevance, none)
    assert (indices >= 512).any()
    assert (indices < 512).any()


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=slow)])
@pytest.mark.parametrize("case", ["default", *(pytest.param(case, marks=slow) for case in list(test_prune.CASES)[1:])])
def test_prune_against_float64(dtype, case):
    test_prune.test_against_float64(PtxBackend(seed=9), "clustered", dtype, case)


@slow
@pytest.mark.parametrize("combine", ["intersect", "restrict"])
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_prune_of_adversarial_tokens(combine, name):
    tokens = testing.adversarial_tokens(name, 2, 70, 12)
    kept = PtxBackend(seed=10).prune(tokens, testing.make_query(1, 2, 12), 20, combine=combine)
    test_prune.assert_selection(kept, 2, 70, 20)


@slow
@pytest.mark.parametrize("options", [{}, {"combine": "restrict", "gsp_drop": 0.5}, {"rounds": 2, "oversample": 3.0}])
@pytest.mark.parametrize("widest", [8192, 40], ids=["matrix", "matrix-free"])
def test_packed_segments(options, widest, monkeypatch):
    """Segments of any lengths in one launch, one of them without tokens, some above WIDEST, lowered here."""
    monkeypatch.setattr(layout, "WIDEST", widest)
    lengths, keep = [65, 17, 1, 0, 30], [16, 17, 1, 0, 5]
    tokens = testing.make_tokens("clustered", 1, sum(lengths), 24, dtype=BF16)[0]
    query = testing.make_query(len(lengths), 3, 24, dtype=BF16)
    if widest > 40:
        test_prune_varlen.assert_varlen(PtxBackend(seed=11), tokens, lengths, query, keep, **options)
    else:
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        tokens, query = tokens.float(), query.float()
        kept = PtxBackend(seed=11).prune_varlen(tokens, bounds, query, keep, **options)
        assert torch.equal(kept, reference.prune_varlen(tokens, bounds, query, keep, dtype=torch.float64, **options))


@slow
def test_bits_depend_neither_on_the_programs_nor_on_their_order():
    tokens, relevance = testing.make_tokens("photo", 1, 150, 48), testing.make_relevance(1, 150)
    found = []
    for seed, columns in enumerate((1024, 64, 64, 256)):
        with interpreted(seed=seed):
            found.append(launch_qcsp(tokens, relevance, 12, columns=columns))
    for indices, gains in found[1:]:
        assert torch.equal(indices, found[0][0])
        assert torch.equal(gains, found[0][1])


@slow
def test_every_opcode_of_the_launch_tables_is_known():
    launches = targets.collect(None, ("sm_80",))
    for launch in launches:
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        compiled = triton.compile(source, target=targets.gpu_target("sm_80"), options=launch.options.__dict__)
        Program(parse(compiled.asm["ptx"]))
    assert len(launches) > 100
