"""What interpreted kernels read and write: nothing outside the tensors of a launch, whatever values they are given."""

import pytest
import torch
from triton_interpreter import BACKEND, DEVICE, bounds_checked, quiet

from script_kernels import testing
from script_kernels.triton.kernels import layout

pytestmark = [quiet, pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")]

LARGEST = 2**31 - 1
BOUNDS = {
    "descending": [60, 40, 20, 0],
    "overlapping": [0, 60, 0, 60],
    "beyond": [0, 20, 1000, LARGEST],
    "negative": [-5, -(2**31), 30, 60],
    "all beyond": [LARGEST] * 4,
    "short": [0, 10, 20, 30],
    "late": [50, 52, 55, 60],
    "zero": [0, 0, 0, 0],
}


@pytest.mark.parametrize("options", [{}, {"combine": "restrict", "rounds": 2}], ids=["default", "restrict"])
@pytest.mark.parametrize("widest", [8192, 25], ids=["matrix", "matrix-free"])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=list(BOUNDS))
def test_malformed_segments_stay_inside_their_tensors(bounds, widest, options, monkeypatch):
    """And what comes out are tokens that exist, as many as were asked for."""
    monkeypatch.setattr(layout, "WIDEST", widest)
    tokens = testing.make_tokens("clustered", 1, 60, 12)[0]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    aligned = tokens[:, :5] if options else None
    query = testing.make_query(3, 3, 5 if options else 12)
    with bounds_checked() as checked:
        kept = BACKEND.prune_varlen(tokens, cu_seqlens, query, [7, 20, 3], aligned=aligned, **options)
    assert checked[0] > 200
    assert kept.shape == (30,)
    assert ((kept >= 0) & (kept < 60)).all()


def test_sound_segments_beside_a_malformed_one_are_unharmed():
    """Bounds up to the first one out of order are as given, and so are their tokens."""
    tokens = testing.make_tokens("clustered", 1, 60, 12)[0]
    sound = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    spoilt = torch.tensor([0, 20, 40, -7], dtype=torch.int32)
    expected = BACKEND.prune_varlen(tokens, sound, None, [5, 6, 7])
    assert torch.equal(BACKEND.prune_varlen(tokens, spoilt, None, [5, 6, 7])[:11], expected[:11])


@pytest.mark.parametrize("n", [1, 2, 17, 65, 130])
def test_every_launch_stays_inside_its_tensors(n):
    tokens, query = testing.make_tokens("gaussian", 2, n, 19), testing.make_query(1, 40, 19)
    relevance = testing.make_relevance(2, n)
    k = min(n, 5)
    with bounds_checked() as checked:
        BACKEND.query_relevance(tokens, query, torch.rand(2, 40) < 0.5)
        BACKEND.bipartite_match(tokens)
        BACKEND.gsp(tokens, max(1, n // 2 + 1), rounds=2 if n > 2 else 1)
        BACKEND.dpp_map(testing.kernel64(tokens, relevance).float(), k)
        for columns, matrix_free in ((64, False), (1024, False), (128, True)):
            BACKEND.qcsp(tokens, relevance, k, columns=columns, matrix_free=matrix_free)
        BACKEND.prune(tokens.mT.contiguous().mT, query, k)
    assert checked[0] > 100


def test_an_access_outside_is_seen():
    """Negative control: a tensor shorter than the launch believes."""
    tokens = testing.make_tokens("gaussian", 1, 9, 8)
    sizes = layout.Layout(1, 10)
    from script_kernels.triton.kernels.rows import launch_rows

    with bounds_checked(), pytest.raises(Exception, match="outside the tensors"):
        launch_rows(tokens, sizes)


@pytest.mark.parametrize("value", [2, 3, 128, 255])
def test_any_byte_but_zero_is_true(value):
    """A mask may come from bytes that are not 0 and 1."""
    tokens, query = testing.make_tokens("gaussian", 2, 30, 12), testing.make_query(1, 6, 12)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0]], dtype=torch.uint8)
    odd = (mask * value).view(torch.bool)
    plain = mask.bool()
    assert torch.equal(BACKEND.query_relevance(tokens, query, odd), BACKEND.query_relevance(tokens, query, plain))
    kept = BACKEND.prune(tokens, query, 7, query_mask=odd)
    assert torch.equal(kept, BACKEND.prune(tokens, query, 7, query_mask=plain))
