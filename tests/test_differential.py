"""The ops against the float64 oracle and against the NumPy face, drawn by hypothesis; test_simd.py repeats this file on
every SIMD level, and `make dependability` with many more examples."""

import math

import ml_dtypes
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_invariants import prunings, selections

import script_kernels
import script_kernels.numpy as script_numpy
from script_kernels import reference, testing
from script_kernels.options import GspOptions

COSINE = 4e-6  # error of a cosine of rows up to 70 wide
GRAPH = ("threshold", "gamma", "min_degree", "rounds")


def array_of(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def assert_same(arrays, tensors):
    """Bit for bit, single or several."""
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    tensors = tensors if isinstance(tensors, tuple) else (tensors,)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == tensor.contiguous().numpy().tobytes()


@given(problem=prunings(), masked=st.booleans())
def test_query_relevance(problem, masked):
    tokens, query, _, options = problem
    if query is None:
        query = testing.make_query(1, 2, tokens.shape[2], dtype=tokens.dtype)
    mask = torch.arange(query.shape[1])[None] % 2 == 0 if masked else None
    relevance = script_kernels.query_relevance(tokens, query, mask, negate=options["negate"])
    assert_same(
        script_numpy.query_relevance(
            array_of(tokens), array_of(query), None if mask is None else mask.numpy(), negate=options["negate"]
        ),
        relevance,
    )
    exact = reference.query_relevance(tokens, query, mask, negate=options["negate"], dtype=torch.float64)
    score = reference.cosine(tokens, query.expand(len(tokens), -1, -1), torch.float64)
    score = score[:, :, mask[0]].mean(2) if masked else score.mean(2)
    bad = reference.bad_rows(tokens)
    spread = score.masked_fill(bad, -math.inf).amax(1) - score.masked_fill(bad, math.inf).amin(1)
    for b in range(len(tokens)):
        if bad[b].all() or 1e-8 < spread[b] < 1e-5:  # too near the limit below which all count as equal
            continue
        error = (relevance[b] - exact[b]).abs().max()
        assert error <= 2 * COSINE / max(float(spread[b]), 1e-5) + 1e-6, b


@given(problem=prunings())
def test_bipartite_match(problem):
    tokens, _, _, options = problem
    threshold = options["threshold"]
    got = script_kernels.bipartite_match(tokens, threshold)
    assert_same(script_numpy.bipartite_match(array_of(tokens), threshold), got)
    best, match, degree, mean, density = got
    cosine = reference.cosine(tokens[:, 0::2], tokens[:, 1::2], torch.float64)
    if cosine.shape[2] == 0:
        assert (match == -1).all()
        assert not any(bool(x.any()) for x in (best, degree, mean, density))
        return
    assert ((best - cosine.amax(2)).abs() <= COSINE).all()
    assert (match % 2 == 1).all()
    chosen = cosine.gather(2, (match.long() // 2)[:, :, None]).squeeze(2)
    assert (chosen >= cosine.amax(2) - 2 * COSINE).all()
    assert (degree >= (cosine >= threshold + COSINE).sum(2)).all()
    assert (degree <= (cosine >= threshold - COSINE).sum(2)).all()
    assert ((density - cosine.mean(2)).abs() <= COSINE).all()
    clear = ((cosine - threshold).abs() > COSINE).all(2)
    near = cosine.masked_fill(cosine < threshold, 0.0).sum(2) / (cosine >= threshold).sum(2).clamp(min=1)
    assert ((mean - near).abs() <= COSINE)[clear].all()


@given(problem=prunings())
def test_gsp(problem):
    tokens, _, _, options = problem
    keep = tokens.shape[1] - math.floor(options["gsp_drop"] * tokens.shape[1])
    graph = {name: options[name] for name in GRAPH}
    mask, redundancy = script_kernels.gsp(tokens, keep, **graph)
    assert_same(script_numpy.gsp(array_of(tokens), keep, **graph), (mask, redundancy))
    assert mask.sum(1).tolist() == [keep] * len(tokens)
    exact, score = reference.gsp(tokens, keep, dtype=torch.float64, **graph)
    for b in range(len(tokens)):
        if testing.gsp_is_clear_cut(tokens[b : b + 1], keep, GspOptions(**graph)):
            assert torch.equal(mask[b], exact[b]), b
            assert torch.allclose(redundancy[b].double(), score[b], rtol=2e-4, atol=2e-4), b


@given(problem=selections())
def test_greedy(problem):
    tokens, relevance, k = problem
    got = script_kernels.qcsp(tokens, relevance, k)
    assert_same(script_numpy.qcsp(array_of(tokens), relevance.numpy(), k), got)
    testing.certify(testing.kernel64(tokens, relevance), got[0])
    kernel = testing.kernel64(tokens, relevance.nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4)).float()
    picks = script_kernels.dpp_map(kernel, k)
    assert_same(script_numpy.dpp_map(kernel.numpy(), k), picks)
    testing.certify(testing.kernel64_of(kernel), picks[0])


@given(problem=prunings())
def test_prune(problem):
    tokens, query, keep, options = problem
    kept = script_kernels.prune(tokens, query, keep, **options)
    words = None if query is None else array_of(query)
    assert_same(script_numpy.prune(array_of(tokens), words, keep, **options), kept)
    starts = torch.arange(len(tokens) + 1, dtype=torch.int32) * tokens.shape[1]
    packed = script_kernels.prune_varlen(tokens.flatten(0, 1), starts, query, [keep] * len(tokens), **options)
    assert torch.equal(packed.view(kept.shape) - starts[:-1, None], kept)
    assert_same(
        script_numpy.prune_varlen(
            array_of(tokens.flatten(0, 1)), starts.numpy(), words, [keep] * len(tokens), **options
        ),
        packed,
    )
    # Where no rounding can change a step, there is one answer.
    graph = GspOptions(**{name: options[name] for name in GRAPH})
    left = tokens.shape[1] - math.floor(options["gsp_drop"] * tokens.shape[1])
    for b in range(len(tokens)):
        own = None if query is None else query[b if len(query) > 1 else 0][None]
        image = tokens[b : b + 1]
        if options["combine"] != "intersect" or not testing.gsp_is_clear_cut(image, left, graph):
            continue
        relevance = torch.ones(1, image.shape[1], dtype=torch.float64)
        if own is not None:
            relevance = reference.query_relevance(image, own, negate=options["negate"], dtype=torch.float64)
        pool = min(image.shape[1], math.ceil(options["oversample"] * keep))
        kernel = testing.kernel64(image, relevance)[0]
        if not kernel.any() or testing.greedy_margin(kernel, pool) < 1e-4:
            continue
        exact = reference.prune(image, own, keep, dtype=torch.float64, **options)
        assert torch.equal(kept[b], exact[0]), b
