"""What holds of every op on any input: drawn by hypothesis over shapes, dtypes, layouts and kinds of tokens."""

import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from script_kernels import testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def token_batches(draw, max_batch=3, max_tokens=90, kinds=(*testing.KINDS, *testing.ADVERSARIAL)):
    B, N, D = draw(st.integers(1, max_batch)), draw(st.integers(1, max_tokens)), draw(st.integers(1, 70))
    kind, dtype, seed = draw(st.sampled_from(kinds)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**20))
    make = testing.make_tokens if kind in testing.KINDS else testing.adversarial_tokens
    return make(kind, B, N, D, dtype=dtype, seed=seed)


def relevance_of(draw, tokens):
    B, N, _ = tokens.shape
    seed = draw(st.integers(0, 2**20))
    kind = draw(st.sampled_from(["uniform", "ones", "zeros", "few", "wild"]))
    relevance = testing.make_relevance(B, N, seed=seed)
    if kind == "ones":
        return torch.ones(B, N)
    if kind == "zeros":
        return torch.zeros(B, N)
    if kind == "few":  # many equal values
        return (relevance * 3).floor() / 3
    if kind == "wild":
        values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1.0, 0.0, 1e-15, 0.5])
        return values[(relevance * 8).long()]
    return relevance


@st.composite
def selections(draw):
    tokens = draw(token_batches())
    return tokens, relevance_of(draw, tokens), draw(st.integers(1, tokens.shape[1]))


@st.composite
def prunings(draw):
    tokens = draw(token_batches())
    B, N, D = tokens.shape
    query = None
    if draw(st.booleans()):
        query = testing.make_query(draw(st.sampled_from([1, B])), draw(st.integers(1, 5)), D, dtype=tokens.dtype)
    options = {
        "gsp_drop": draw(st.floats(0, 0.5)),
        "oversample": draw(st.floats(1, 4)),
        "combine": draw(st.sampled_from(["intersect", "restrict"])),
        "threshold": draw(st.floats(-1, 1)),
        "gamma": draw(st.floats(-10, 10)),
        "min_degree": draw(st.integers(0, 20)),
        "rounds": draw(st.integers(1, 3)),
        "negate": draw(st.booleans()),
        "floor": draw(st.sampled_from([0.0, 0.3, 1.0])),
    }
    return tokens, query, draw(st.integers(1, N)), options


def same(a, b):
    """Bitwise equality of results, single or several."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def calls(op, tokens, query, keep, options):
    """(name, function of (tokens, query, relevance), ...) of every op that takes a batch of tokens."""
    k = min(tokens.shape[1], 2 * keep)
    left = tokens.shape[1] - math.floor(options["gsp_drop"] * tokens.shape[1])
    graph = {n: options[n] for n in ("threshold", "gamma", "min_degree", "rounds")}
    return {
        "query_relevance": lambda x, q, r: op.query_relevance(x, q, negate=options["negate"]) if q is not None else (),
        "bipartite_match": lambda x, q, r: op.bipartite_match(x, options["threshold"]),
        "gsp": lambda x, q, r: op.gsp(x, left, **graph),
        "qcsp": lambda x, q, r: op.qcsp(x, r, k),
        "prune": lambda x, q, r: op.prune(x, q, keep, **options),
    }


# --- the promises on any input


@given(problem=selections())
def test_qcsp_keeps_every_promise(backend, problem):
    tokens, relevance, k = problem
    indices, gains = backend.qcsp(tokens.to(backend.device), relevance.to(backend.device), k)
    kernel64 = testing.kernel64(tokens, relevance)
    testing.certify(kernel64, indices, gains)
    bad = ~torch.isfinite(tokens).all(-1) | ~torch.isfinite(relevance)
    testing.certify_fallback(indices.cpu(), gains.cpu(), relevance, bad)


@given(problem=prunings())
def test_prune_gives_distinct_ascending_indices_in_range(backend, problem):
    tokens, query, keep, options = problem
    kept = backend.prune(
        tokens.to(backend.device), None if query is None else query.to(backend.device), keep, **options
    )
    assert kept.shape == (tokens.shape[0], keep)
    assert (kept.diff(dim=1) > 0).all()
    assert ((kept >= 0) & (kept < tokens.shape[1])).all()


@given(problem=prunings())
def test_gsp_keeps_as_many_as_asked(backend, problem):
    tokens, _, _, options = problem
    N = tokens.shape[1]
    keep = N - math.floor(options["gsp_drop"] * N)
    graph = {n: options[n] for n in ("threshold", "gamma", "min_degree", "rounds")}
    mask, redundancy = backend.gsp(tokens.to(backend.device), keep, **graph)
    assert (mask.sum(1) == keep).all()
    assert not redundancy.isnan().any()
    if options["rounds"] == 1:
        assert mask[:, 1::2].all()  # destinations stay


@given(problem=prunings())
def test_relevance_is_in_the_unit_interval(backend, problem):
    tokens, query, _, options = problem
    if query is None:
        query = testing.make_query(1, 2, tokens.shape[2], dtype=tokens.dtype)
    relevance = backend.query_relevance(tokens.to(backend.device), query.to(backend.device), negate=options["negate"])
    assert ((relevance >= 0) & (relevance <= 1)).all()
    bad = ~torch.isfinite(tokens).all(-1)
    assert (relevance.cpu()[bad] == 0).all()
    finite = ~bad.all(1)
    assert torch.allclose(relevance.cpu().amax(1)[finite], torch.ones(1), atol=1e-6)


# --- bit for bit: layouts, batches, repetition, threads


@given(problem=prunings(), seed=st.integers(0, 2**20), layout=st.sampled_from(testing.LAYOUTS))
def test_layout_does_not_matter(op, problem, seed, layout):
    tokens, query, keep, options = problem
    tokens = tokens.to(op.device)
    query = None if query is None else query.to(op.device)
    relevance = testing.make_relevance(*tokens.shape[:2], seed=seed, device=op.device)
    for name, call in calls(op, tokens, query, keep, options).items():
        expected = call(tokens, query, relevance)
        laid_out = (
            testing.as_layout(tokens, layout),
            None if query is None else testing.as_layout(query, layout),
            testing.as_layout(relevance, layout),
        )
        assert same(call(*laid_out), expected), name


@given(problem=prunings(), seed=st.integers(0, 2**20))
def test_an_image_alone_gives_what_it_gives_in_a_batch(op, problem, seed):
    tokens, query, keep, options = problem
    tokens = tokens.to(op.device)
    query = None if query is None else query.to(op.device)
    relevance = testing.make_relevance(*tokens.shape[:2], seed=seed, device=op.device)
    for name, call in calls(op, tokens, query, keep, options).items():
        whole = call(tokens, query, relevance)
        for b in range(tokens.shape[0]):
            own_query = query if query is None or len(query) == 1 else query[b : b + 1]
            alone = call(tokens[b : b + 1], own_query, relevance[b : b + 1])
            part = whole[b : b + 1] if isinstance(whole, torch.Tensor) else tuple(t[b : b + 1] for t in whole)
            assert same(alone, part), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 577, 96), (3, 300, 33)])
def test_batch_invariance_at_full_size(op, dtype, shape):
    tokens = testing.make_tokens("photo", *shape, dtype=dtype, device=op.device)
    query = testing.make_query(shape[0], 3, shape[2], dtype=dtype, device=op.device)
    relevance = testing.make_relevance(*shape[:2], device=op.device)
    options = {"gsp_drop": 0.25, "threshold": 0.6, "gamma": 1.0, "min_degree": 4, "rounds": 1, "negate": False}
    for name, call in calls(op, tokens, query, 64, options).items():
        whole = call(tokens, query, relevance)
        for b in (0, shape[0] - 1):
            alone = call(tokens[b : b + 1], query[b : b + 1], relevance[b : b + 1])
            part = whole[b : b + 1] if isinstance(whole, torch.Tensor) else tuple(t[b : b + 1] for t in whole)
            assert same(alone, part), name


@given(problem=token_batches(max_batch=1), keep_share=st.floats(0, 1), batch=st.integers(2, 4))
def test_expanded_images_give_the_same_result_each(op, problem, keep_share, batch):
    tokens = problem.to(op.device)
    keep = max(1, math.floor(keep_share * tokens.shape[1]))
    wide = tokens.expand(batch, -1, -1)
    assert wide.stride(0) == 0
    query = testing.make_query(1, 3, tokens.shape[2], dtype=tokens.dtype, device=op.device)
    alone = op.prune(tokens, query, keep)
    assert torch.equal(op.prune(wide, query.expand(batch, -1, -1), keep), alone.expand(batch, -1))
    relevance = torch.ones((), device=op.device).expand(batch, tokens.shape[1])
    indices, gains = op.qcsp(wide, relevance, keep)
    expected = op.qcsp(tokens, torch.ones(1, tokens.shape[1], device=op.device), keep)
    assert same((indices, gains), tuple(t.expand(batch, -1) for t in expected))


@given(problem=token_batches(kinds=testing.KINDS), layout=st.sampled_from(testing.LAYOUTS), share=st.floats(0, 1))
def test_dpp_map_layouts_and_batches(op, problem, layout, share):
    kernel = testing.kernel64(problem).float().to(op.device)
    k = max(1, math.floor(share * kernel.shape[1]))
    expected = op.dpp_map(kernel, k)
    assert same(op.dpp_map(testing.as_layout(kernel, layout), k), expected)
    for b in range(kernel.shape[0]):
        assert same(op.dpp_map(kernel[b : b + 1], k), tuple(t[b : b + 1] for t in expected))
    wide = op.dpp_map(kernel[:1].expand(3, -1, -1), k)
    assert same(wide, tuple(t[:1].expand(3, -1) for t in expected))


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 577, 128), (5, 200, 64), (2, 1, 3)])
def test_runs_and_thread_counts_repeat_bit_for_bit(op, dtype, shape):
    tokens = testing.make_tokens("photo", *shape, dtype=dtype, device=op.device)
    query = testing.make_query(shape[0], 3, shape[2], dtype=dtype, device=op.device)
    relevance = testing.make_relevance(*shape[:2], device=op.device)
    options = {"gsp_drop": 0.25, "threshold": 0.6, "gamma": 1.0, "min_degree": 4, "rounds": 1, "negate": False}
    functions = calls(op, tokens, query, (shape[1] + 7) // 8, options)
    kernel = testing.kernel64(tokens, relevance).float().to(op.device)
    functions["dpp_map"] = lambda x, q, r: op.dpp_map(kernel, (shape[1] + 3) // 4)
    cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32, device=op.device) * shape[1]
    keep = [(shape[1] + 7) // 8] * shape[0]
    functions["prune_varlen"] = lambda x, q, r: op.prune_varlen(x.flatten(0, 1), cu_seqlens, q, keep)
    for name, call in functions.items():
        with threads(1):
            expected = call(tokens, query, relevance)
        for count in (1, 2, 3, 2, 1):
            with threads(count):
                assert same(call(tokens, query, relevance), expected), f"{name} with {count} threads"


FORKING = """
import os, signal
import torch
import script_kernels
torch.set_num_threads(2)
tokens = torch.randn(4, 1500, 256, generator=torch.Generator().manual_seed(0))
kept = script_kernels.prune(tokens, None, 100), script_kernels.prune(tokens[:1], None, 100)
child = os.fork()
if child == 0:
    signal.alarm(60)
again = script_kernels.prune(tokens, None, 100), script_kernels.prune(tokens[:1], None, 100)
same = all(torch.equal(now, before) for now, before in zip(again, kept))
if child == 0:
    os._exit(0 if same else 3)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_child_does_not_wait_for_threads_that_it_has_not():
    """Of a batch and of one image; torch's own operations do wait there."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_inputs_are_left_alone(op):
    tokens = testing.adversarial_tokens("bad_rows", 2, 50, 16, device=op.device)
    query = testing.make_query(2, 3, 16, device=op.device)
    relevance = testing.make_relevance(2, 50, device=op.device)
    kernel = testing.kernel64(tokens, relevance).float().to(op.device)
    before = [t.clone() for t in (tokens, query, relevance, kernel)]
    options = {"gsp_drop": 0.25, "threshold": 0.2, "gamma": 1.0, "min_degree": 4, "rounds": 1, "negate": True}
    for call in calls(op, tokens, query, 10, options).values():
        call(tokens, query, relevance)
    op.dpp_map(kernel, 50)
    for now, then in zip((tokens, query, relevance, kernel), before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
