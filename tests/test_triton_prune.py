"""The Triton prune and prune_varlen, interpreted on CPU tensors or on the GPU where there is one."""

import math

import pytest
import test_prune
import test_prune_varlen
import torch
from triton_interpreter import BACKEND, DEVICE, quiet

from script_kernels import ops, reference, testing
from script_kernels.triton.kernels import layout
from script_kernels.triton.kernels.choose import launch_intersect, launch_place
from script_kernels.triton.kernels.layout import Layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = quiet


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", test_prune.CASES)
def test_against_float64(case, dtype):
    test_prune.test_against_float64(BACKEND, "clustered", dtype, case)


@pytest.mark.parametrize("case", ["default", "restrict"])
def test_against_the_composition_of_the_launchers(case):
    test_prune.test_against_the_composition(BACKEND, "photo", case, False)


@pytest.mark.parametrize("combine", ["intersect", "restrict"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "keep"), [(1, 1), (2, 2), (63, 60), (100, 25)])
def test_shapes(n, keep, dtype, combine):
    tokens = testing.make_tokens("gaussian", 2, n, 20, dtype=dtype, device=DEVICE)
    query = testing.make_query(1, 3, 20, dtype=dtype, device=DEVICE)
    kept = BACKEND.prune(tokens, query, keep, combine=combine)
    test_prune.assert_selection(kept, 2, n, keep)


@pytest.mark.parametrize("combine", ["restrict", "union"])
def test_checkered_tokens_go_through_the_op_s_entry(combine):
    """On the same kernels, in the order of the checkerboard, and back."""
    asked = {"combine": combine, "split": "checker", "grid_width": 6}
    for aligned in (None, testing.make_tokens("gaussian", 2, 54, 12)):
        tokens = testing.make_tokens("clustered", 2, 54, 20)
        query = testing.make_query(1, 3, 20 if aligned is None else 12)
        device = [x if x is None else x.to(DEVICE) for x in (tokens, query, aligned)]
        kept = ops.cuda_prune(*device[:2], 9, aligned=device[2], **asked)
        assert torch.equal(kept.cpu(), reference.prune(tokens, query, 9, aligned=aligned, dtype=torch.float64, **asked))
    with pytest.raises(ValueError, match="grid_width: expected a divisor"):
        ops.cuda_prune(device[0], None, 9, split="checker", grid_width=5)


def test_full_size():
    tokens, query = testing.make_tokens("photo", 1, 577, 24), testing.make_query(1, 3, 24)
    kept = BACKEND.prune(tokens.to(DEVICE), query.to(DEVICE), 5)
    assert torch.equal(kept.cpu(), reference.prune(tokens, query, 5, dtype=torch.float64))


@pytest.mark.parametrize("combine", ["intersect", "restrict"])
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_adversarial(name, combine):
    """The ranking of 40 tokens holds a bad one only if there are not as many others."""
    tokens = testing.adversarial_tokens(name, 2, 70, 12)
    kept = BACKEND.prune(tokens.to(DEVICE), testing.make_query(1, 2, 12).to(DEVICE), 20, combine=combine).cpu()
    test_prune.assert_selection(kept, 2, 70, 20)
    good = torch.isfinite(tokens).all(-1)
    assert name == "all_bad" or (good.sum(1) >= 40).all()
    assert torch.equal(good.gather(1, kept).sum(1), good.sum(1).clamp(max=20))


@pytest.mark.parametrize("combine", ["intersect", "restrict"])
def test_arguments(combine):
    cases = test_prune.TestArguments()
    cases.test_no_query_is_relevance_of_one(BACKEND, combine)


def test_aligned_rows_give_the_relevance_and_make_tokens_bad():
    tokens = testing.make_tokens("clustered", 1, 40, 20)
    aligned = testing.make_tokens("gaussian", 1, 40, 9, seed=1)
    query = testing.make_query(1, 2, 9)
    for combine in ("intersect", "restrict"):
        expected = reference.prune(tokens, query, 10, aligned=aligned, combine=combine, dtype=torch.float64)
        kept = BACKEND.prune(tokens.to(DEVICE), query.to(DEVICE), 10, aligned=aligned.to(DEVICE), combine=combine)
        assert torch.equal(kept.cpu(), expected)
        spoilt = aligned.clone()
        spoilt[0, expected[0, :5], 3] = float("inf")
        kept = BACKEND.prune(tokens.to(DEVICE), query.to(DEVICE), 12, aligned=spoilt.to(DEVICE), combine=combine).cpu()
        assert not set(kept[0].tolist()) & set(expected[0, :5].tolist())


def test_an_image_alone_keeps_what_it_keeps_in_a_batch():
    tokens = testing.make_tokens("photo", 3, 80, 30, device=DEVICE)
    batch = BACKEND.prune(tokens, None, 20)
    assert torch.equal(BACKEND.prune(tokens[1:2], None, 20)[0], batch[1])


def test_empty_batch():
    assert BACKEND.prune(torch.empty(0, 9, 4, device=DEVICE), None, 3).shape == (0, 3)


@pytest.mark.parametrize("dense", [True, False])
def test_without_a_kernel_matrix(monkeypatch, dense):
    """Images above WIDEST, lowered here, take their kernel rows from the tokens; packed ones of both kinds may mix."""
    tokens = testing.make_tokens("clustered", 1, 150, 20)
    query = testing.make_query(1, 3, 20)
    monkeypatch.setattr(layout, "WIDEST", 70)
    if dense:
        kept = BACKEND.prune(tokens.to(DEVICE), query.to(DEVICE), 12)
        assert torch.equal(kept.cpu(), reference.prune(tokens, query, 12, dtype=torch.float64))
    else:
        bounds = torch.tensor([0, 90, 150], dtype=torch.int32)
        kept = BACKEND.prune_varlen(tokens[0].to(DEVICE), bounds.to(DEVICE), query.to(DEVICE), [12, 7])
        expected = reference.prune_varlen(tokens[0], bounds, query, [12, 7], dtype=torch.float64)
        assert torch.equal(kept.cpu(), expected)


# --- intersection


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_intersection(share):
    generator = torch.Generator().manual_seed(3)
    ranking = torch.stack([torch.randperm(1300, generator=generator)[:1100] for _ in range(2)])
    mask = torch.rand(2, 1300, generator=generator) < share
    kept = launch_intersect(ranking.to(DEVICE), Layout(2, 1300), mask.to(DEVICE), 400, 800)
    assert torch.equal(kept.view(2, 400).cpu(), reference.mask_intersect(ranking, mask, 400))


def test_intersection_without_a_mask_sorts():
    ranking = torch.tensor([[5, 1, 4, -1], [0, 3, 2, -1]], device=DEVICE)
    assert launch_intersect(ranking, Layout(2, 6), None, 3, 6).tolist() == [1, 4, 5, 0, 2, 3]


# --- packed segments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"combine": "restrict", "gsp_drop": 0.5}, {"rounds": 2, "oversample": 3.0, "floor": 0.4}]
)
def test_varlen_equals_prune_per_segment(options, dtype):
    lengths, keep = [65, 17, 1, 0, 30], [16, 17, 1, 0, 5]
    tokens = testing.make_tokens("clustered", 1, sum(lengths), 24, dtype=dtype, device=DEVICE)[0]
    query = testing.make_query(len(lengths), 3, 24, dtype=dtype, device=DEVICE)
    test_prune_varlen.assert_varlen(BACKEND, tokens, lengths, query, keep, **options)


@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_varlen_of_adversarial_tokens(name):
    lengths, keep = [30, 3, 37], [13, 2, 17]
    tokens = testing.adversarial_tokens(name, 1, 70, 16, device=DEVICE)[0]
    test_prune_varlen.assert_varlen(BACKEND, tokens, lengths, testing.make_query(1, 2, 16, device=DEVICE), keep)


def test_varlen_of_a_strided_and_of_an_empty_batch():
    tokens = testing.make_tokens("clustered", 1, 60, 48, device=DEVICE)[0, :, ::2]
    test_prune_varlen.assert_varlen(BACKEND, tokens, [20, 40], None, [5, 9])
    bounds = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    assert BACKEND.prune_varlen(tokens[:0], bounds, None, [0, 0, 0]).shape == (0,)
    assert BACKEND.prune_varlen(tokens[:0], bounds[:1], None, []).shape == (0,)


@pytest.mark.parametrize("oversample", [1.0, 1.1, 2.0, 1e30])
def test_counts_reach_the_device(oversample):
    keep = [3 * i % 101 for i in range(70)]
    bounds = torch.arange(142, dtype=torch.int32, device=DEVICE)[::2]
    counts, limits, sound = launch_place(keep, bounds, oversample, 150)
    assert counts.tolist() == keep
    assert limits.tolist() == [min(150, math.ceil(oversample * k)) for k in keep]
    assert torch.equal(sound, bounds)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_bounds_become_sound_whatever_they_are(count):
    generator = torch.Generator().manual_seed(count)
    bounds = torch.randint(-50, 200, (count + 1,), generator=generator, dtype=torch.int32)
    bounds[::7] = torch.tensor([2**31 - 1, -(2**31), 150])[torch.arange(len(bounds[::7])) % 3]
    sound = launch_place([1] * count, bounds.to(DEVICE), 2.0, 150)[2].cpu()
    assert torch.equal(sound, bounds.cummax(0).values.clamp(0, 150))
