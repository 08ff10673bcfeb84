"""prune_varlen is prune on each segment alone, bit for bit."""

import itertools

import pytest
import torch

from script_kernels import testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def per_segment(backend, tokens, lengths, query, keep, *, aligned=None, **options):
    starts = [0, *itertools.accumulate(lengths)]
    kept = [torch.empty(0, dtype=torch.int64, device=tokens.device)]
    for s, length in enumerate(lengths):
        if length == 0:
            continue
        part = slice(starts[s], starts[s + 1])
        kept.append(
            starts[s]
            + backend.prune(
                tokens[None, part],
                None if query is None else query[s if len(query) > 1 else 0][None],
                keep[s],
                aligned=None if aligned is None else aligned[None, part],
                **options,
            )[0]
        )
    return torch.cat(kept)


def assert_varlen(backend, tokens, lengths, query, keep, **options):
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=tokens.device)
    kept = backend.prune_varlen(tokens, cu_seqlens, query, keep, **options)
    assert kept.dtype == torch.int64
    assert kept.shape == (sum(keep),)
    assert torch.equal(kept, per_segment(backend, tokens, lengths, query, keep, **options))


LENGTHS = [([64, 33, 1, 0, 100], [16, 33, 1, 0, 5]), ([0, 0], [0, 0]), ([17], [4]), ([2, 2, 2, 576], [1, 2, 1, 64])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "keep"), LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, {"combine": "restrict", "gsp_drop": 0.5}, {"rounds": 2, "oversample": 3.0, "floor": 0.4}]
)
def test_equals_prune_per_segment(backend, dtype, lengths, keep, options):
    total = sum(lengths)
    tokens = testing.make_tokens("clustered", 1, max(total, 1), 24, dtype=dtype, device=backend.device)[0, :total]
    assert_varlen(backend, tokens, lengths, None, keep, **options)
    query = testing.make_query(len(lengths), 3, 24, dtype=dtype, device=backend.device)
    assert_varlen(backend, tokens, lengths, query, keep, **options)
    assert_varlen(backend, tokens, lengths, query[:1], keep, negate=True, **options)


@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_adversarial_tokens(backend, name):
    lengths, keep = [40, 3, 97], [13, 2, 64]
    tokens = testing.adversarial_tokens(name, 1, 140, 16, device=backend.device)[0]
    query = testing.make_query(3, 2, 16, device=backend.device)
    assert_varlen(backend, tokens, lengths, query, keep)
    assert_varlen(backend, tokens, lengths, query, keep, combine="restrict")


def test_aligned_tokens(backend):
    lengths, keep = [40, 25], [10, 6]
    tokens = testing.make_tokens("clustered", 1, 65, 16, device=backend.device)[0]
    aligned = testing.make_tokens("gaussian", 1, 65, 9, seed=1, device=backend.device)[0]
    query = testing.make_query(2, 2, 9, device=backend.device)
    for combine in ("intersect", "restrict"):
        assert_varlen(backend, tokens, lengths, query, keep, aligned=aligned, combine=combine)


def test_a_bad_token_stays_in_its_segment(backend):
    tokens = testing.make_tokens("gaussian", 1, 60, 8, device=backend.device)[0]
    cu_seqlens = torch.tensor([0, 30, 60], dtype=torch.int32, device=backend.device)
    clean = backend.prune_varlen(tokens, cu_seqlens, None, [8, 8])
    tokens[10] = float("nan")
    spoiled = backend.prune_varlen(tokens, cu_seqlens, None, [8, 8])
    assert torch.equal(spoiled[8:], clean[8:])
    assert 10 not in spoiled[:8].tolist()


@pytest.mark.parametrize("layout", ["sliced", "inner_strided", "offset"])
def test_layouts(backend, layout):
    tokens = testing.make_tokens("clustered", 1, 80, 16, device=backend.device)[0]
    query = testing.make_query(2, 3, 16, device=backend.device)
    cu_seqlens = torch.tensor([0, 47, 80], dtype=torch.int32, device=backend.device)
    expected = backend.prune_varlen(tokens, cu_seqlens, query, [9, 7], aligned=tokens.flip(0))
    result = backend.prune_varlen(
        testing.as_layout(tokens, layout),
        testing.as_layout(cu_seqlens, "offset" if layout == "offset" else "sliced"),
        testing.as_layout(query, layout),
        [9, 7],
        aligned=testing.as_layout(tokens.flip(0), layout),
    )
    assert torch.equal(result, expected)


def test_no_segments(backend):
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=backend.device)
    kept = backend.prune_varlen(torch.empty(0, 8, device=backend.device), cu_seqlens, None, [])
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64
