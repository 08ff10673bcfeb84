"""max_min, mmr, and the options of qcsp, query_relevance and prune, against certificates, oracles and plain readings;
test_simd.py repeats this file on every SIMD level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_differential import array_of, assert_same
from test_invariants import prunings, selections

import script_kernels
import script_kernels.numpy as script_numpy
from script_kernels import reference, testing
from script_kernels.options import GspOptions, rounds_needed

BALANCES = [0.0, 0.3, 1.0]


# --- max_min and mmr


@given(problem=selections(), weighted=st.booleans())
def test_max_min_is_farthest_point_first(problem, weighted):
    tokens, relevance, k = problem
    relevance = relevance if weighted else None
    indices, gains = script_kernels.max_min(tokens, relevance, k)
    assert_same(
        script_numpy.max_min(array_of(tokens), None if relevance is None else relevance.numpy(), k), (indices, gains)
    )
    exact = testing.certify_max_min(tokens, relevance, indices)
    _, r = testing._bad_and_relevance(tokens, relevance)
    error = (gains - exact).abs().amax(1) / r.clamp(min=0).amax(1).clamp(min=1e-30)
    assert (error <= 2e-5).all()


@given(problem=selections(), balance=st.sampled_from(BALANCES))
def test_mmr_trades_relevance_for_similarity(problem, balance):
    tokens, relevance, k = problem
    indices, gains = script_kernels.mmr(tokens, relevance, k, balance=balance)
    assert_same(script_numpy.mmr(array_of(tokens), relevance.numpy(), k, balance=balance), (indices, gains))
    exact = testing.certify_mmr(tokens, relevance, indices, balance)
    _, r = testing._bad_and_relevance(tokens, relevance)
    assert ((gains - exact).abs().amax(1) <= 2e-5 * (2 + balance * (r.amax(1) - r.amin(1)))).all()


@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_images_pass_the_certificates(kind, dtype):
    tokens, relevance = testing.make_tokens(kind, 1, 700, 48, dtype=dtype), testing.make_relevance(1, 700)
    for r in (None, relevance):
        indices, _ = script_kernels.max_min(tokens, r, 150)
        testing.certify_max_min(tokens, r, indices)
        for b in (0, 1):  # and neither the batch nor the number of threads matters
            both = script_kernels.max_min(tokens.repeat(2, 1, 1), None if r is None else r.repeat(2, 1), 150)
            assert torch.equal(both[0][b], indices[0])
    for balance in BALANCES:
        indices, _ = script_kernels.mmr(tokens, relevance, 150, balance=balance)
        testing.certify_mmr(tokens, relevance, indices, balance)


@pytest.mark.parametrize("kind", ["gaussian", "clustered", "photo"])
def test_changing_places_changes_nothing(kind):
    """A longer ranking starts with the shorter ones, in which tokens change places at another pick, or never."""
    tokens, relevance = testing.make_tokens(kind, 1, 1000, 64), testing.make_relevance(1, 1000)
    for rule in (
        lambda k: script_kernels.max_min(tokens, None, k),
        lambda k: script_kernels.max_min(tokens, relevance, k),
        lambda k: script_kernels.mmr(tokens, torch.ones_like(relevance), k),
    ):
        indices, gains = rule(400)
        for k in (47, 48, 100, 250):
            shorter = rule(k)
            assert torch.equal(shorter[0], indices[:, :k])
            assert torch.equal(shorter[1], gains[:, :k])


@pytest.mark.parametrize("name", testing.ADVERSARIAL)
def test_hard_tokens_pass_the_certificates(name):
    tokens, relevance = testing.adversarial_tokens(name, 2, 130, 24), testing.make_relevance(2, 130)
    testing.certify_max_min(tokens, None, script_kernels.max_min(tokens, None, 130)[0])
    testing.certify_max_min(tokens, relevance, script_kernels.max_min(tokens, relevance, 130)[0])
    testing.certify_mmr(tokens, relevance, script_kernels.mmr(tokens, relevance, 130)[0])


def test_ties_go_to_the_lowest_index():
    tokens = torch.randn(1, 1, 33, generator=torch.Generator().manual_seed(0)).repeat(1, 150, 1)
    for indices, _ in (
        script_kernels.max_min(tokens, None, 150),
        script_kernels.mmr(tokens, torch.full((1, 150), 0.3), 150),
        reference.max_min(tokens, None, 150),
        reference.mmr(tokens, torch.full((1, 150), 0.3), 150),
    ):
        assert indices[0].tolist() == list(range(150))
    rising = torch.arange(1.0, 151.0)[None]  # equal tokens are all as near: relevance says nothing
    assert script_kernels.max_min(tokens, rising, 150)[0][0].tolist() == list(range(150))
    pairs = torch.randn(1, 70, 33, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    indices, gains = script_kernels.max_min(pairs, None, 140)
    assert (indices[0, :70] % 2 == 0).all()  # the second of a pair is no farther than itself
    assert (gains[0, 1:70] > 0).all()
    assert indices[0, 70:].tolist() == list(range(1, 140, 2))
    assert not gains[0, 70:].any()


def test_the_oracles_agree_with_the_certificates():
    tokens, relevance = testing.make_tokens("clustered", 2, 90, 20), testing.make_relevance(2, 90)
    tokens[0, 3] = math.nan
    for r in (None, relevance):
        indices, gains = reference.max_min(tokens, r, 90, dtype=torch.float64)
        torch.testing.assert_close(testing.certify_max_min(tokens, r, indices, tol=1e-12), gains, rtol=0, atol=1e-12)
    indices, gains = reference.mmr(tokens, relevance, 90, balance=0.3, dtype=torch.float64)
    torch.testing.assert_close(
        testing.certify_mmr(tokens, relevance, indices, 0.3, tol=1e-12), gains, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rule", ["max_min", "mmr"])
def test_certificates_reject_what_another_rule_picks(rule):
    tokens, relevance = testing.make_tokens("powerlaw", 1, 200, 40), testing.make_relevance(1, 200)
    certify = getattr(testing, f"certify_{rule}")
    own, _ = getattr(script_kernels, rule)(tokens, relevance, 30)
    certify(tokens, relevance, own)
    for other in (
        script_kernels.qcsp(tokens, relevance, 30)[0],
        script_kernels.max_min(tokens, None, 30)[0],
        own.roll(1, 1),
        getattr(script_kernels, rule)(tokens[:, :100], relevance[:, :100], 30)[0],
    ):
        with pytest.raises(AssertionError, match=r"picked token \d+ of residual"):
            certify(tokens, relevance, other)
    with pytest.raises(AssertionError, match="already selected"):
        certify(tokens, relevance, own[:, [0, 0]])


def test_gains_say_what_a_pick_is_worth():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [math.inf, 0.0]]])
    indices, gains = script_kernels.max_min(tokens, torch.tensor([[1e-20, 3e-20, 0.0, 1.0]]), 4)
    assert indices.tolist() == [[1, 0, 2, 3]]
    torch.testing.assert_close(gains, torch.tensor([[3e-20, 1e-20, 0.0, 0.0]]))
    indices, gains = script_kernels.max_min(tokens[:, :1], torch.tensor([[3e38]]), 1)
    assert gains.tolist() == [[torch.finfo(torch.float32).max]]  # twice that, as far as float32 goes
    _, gains = script_kernels.mmr(tokens, torch.tensor([[-4.0, 2.0, 3.0, 0.0]]), 4, balance=0.5)
    torch.testing.assert_close(gains, torch.tensor([[1.5, 1.0, -2.0, 0.0]]))
    indices, gains = script_kernels.mmr(tokens, torch.tensor([[-3e38, 3e38, 0.0, 1.0]]), 4, balance=1.0)
    assert indices.tolist() == [[1, 2, 0, 3]]
    torch.testing.assert_close(gains, torch.tensor([[3e38, 0.0, -3e38, 0.0]]))


# --- the options of qcsp


@given(
    problem=selections(),
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.5, 64.0]),
    normalize=st.booleans(),
    ridge=st.sampled_from([0.0, 1e-3, 1.0, 1e30]),
)
def test_the_kernel_of_qcsp_is_the_one_its_options_describe(problem, power, normalize, ridge):
    tokens, relevance, k = problem
    options = {"power": power, "normalize": normalize, "ridge": ridge}
    indices, gains = script_kernels.qcsp(tokens, relevance, k, **options)
    assert_same(script_numpy.qcsp(array_of(tokens), relevance.numpy(), k, **options), (indices, gains))
    kernel = testing.kernel64(tokens, relevance, **options)
    if not torch.isfinite(kernel).all():  # more than a double holds; the op still ranks
        assert all(len(set(picks)) == k for picks in indices.tolist())
        return
    exact = testing.certify(kernel, indices)
    scale = kernel.diagonal(dim1=1, dim2=2).amax(1)
    most = torch.finfo(torch.float32).max
    assert ((gains - exact.clamp(max=most)).abs().amax(1) <= 2e-5 * scale + 1e-44).all()


@pytest.mark.parametrize("options", [{"power": 3.0}, {"normalize": False}, {"ridge": 0.2}])
def test_each_option_of_qcsp_matters_and_the_certificate_sees_it(options):
    tokens, relevance = testing.make_tokens("powerlaw", 1, 200, 40), testing.make_relevance(1, 200)
    tokens *= 1 + torch.arange(200)[None, :, None] % 7
    indices, _ = script_kernels.qcsp(tokens, relevance, 60, **options)
    testing.certify(testing.kernel64(tokens, relevance, **options), indices)
    with pytest.raises(AssertionError, match="picked token"):
        testing.certify(testing.kernel64(tokens, relevance), indices)
    exact, _ = reference.qcsp(tokens, relevance, 60, dtype=torch.float64, **options)
    testing.certify(testing.kernel64(tokens, relevance, **options), exact, tol=1e-12)


def test_past_the_rank_the_relevance_decides_whatever_the_power():
    tokens = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 20, 1)
    relevance = torch.rand(1, 60, generator=torch.Generator().manual_seed(2)) / 2 + 0.5
    bad = torch.zeros(1, 60, dtype=torch.bool)
    for options in ({"power": 30.0}, {"power": 0.0}, {"normalize": False}):
        indices, gains = script_kernels.qcsp(tokens, relevance, 60, **options)
        assert (gains[0] > 0).sum() <= 3
        testing.certify_fallback(indices, gains, relevance, bad)
    assert (script_kernels.qcsp(tokens, relevance, 60, ridge=1.0)[1] > 0.9).all()  # with a ridge there is no end


# --- reduce, power and union


@given(problem=prunings(), masked=st.booleans(), negate=st.booleans())
def test_the_largest_cosine(problem, masked, negate):
    tokens, query, _, _ = problem
    if query is None:
        query = testing.make_query(1, 70, tokens.shape[2], dtype=tokens.dtype)
    mask = torch.arange(query.shape[1])[None] % 3 == 1 if masked else None
    given_ = {"negate": negate, "reduce": "max"}
    relevance = script_kernels.query_relevance(tokens, query, mask, **given_)
    words = None if mask is None else mask.numpy()
    assert_same(script_numpy.query_relevance(array_of(tokens), array_of(query), words, **given_), relevance)
    exact = reference.query_relevance(tokens, query, mask, dtype=torch.float64, **given_)
    score = reference.cosine(tokens, query.expand(len(tokens), -1, -1), torch.float64)
    if masked:
        score = score[:, :, mask[0]] if mask.any() else torch.zeros_like(score)
    score, bad = score.amax(2), reference.bad_rows(tokens)
    for b in range(len(tokens)):
        good = score[b][~bad[b]]
        spread = float(good.max() - good.min()) if len(good) else 0.0
        if len(good) and not 1e-8 < spread < 1e-5:
            assert (relevance[b] - exact[b]).abs().max() <= 1e-5 / max(spread, 1e-5) + 1e-6, b


def test_no_vector_counts_and_one_word_that_fits():
    tokens = torch.eye(4)[None]
    query = torch.stack([torch.eye(4)[0], -torch.ones(4), -torch.ones(4)])[None]
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert script_kernels.query_relevance(tokens, query, nothing, reduce="max").tolist() == [[1.0] * 4]
    assert script_kernels.query_relevance(tokens, query, reduce="max").tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert script_kernels.query_relevance(tokens, query, reduce="max", negate=True).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert script_kernels.query_relevance(tokens, query, ~nothing, reduce="max").tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("options", [{"reduce": "max", "power": 2.0, "floor": 0.2}, {"combine": "union"}])
def test_prune_is_its_stages(options, aligned):
    tokens = testing.make_tokens("clustered", 2, 90, 24)
    other = testing.make_tokens("gaussian", 2, 90, 16) if aligned else None
    query, keep = testing.make_query(2, 5, 16 if aligned else 24), 21
    kept = script_kernels.prune(tokens, query, keep, aligned=other, **options)
    space = tokens if other is None else other
    relevance = script_kernels.query_relevance(space, query, reduce=options.get("reduce", "mean"))
    floor = options.get("floor", 0.0)
    relevance = (floor + (1 - floor) * relevance) ** options.get("power", 1.0)
    if "combine" in options:
        mask, _ = script_kernels.gsp(tokens, 11, rounds=rounds_needed(90, 11))
        order, _ = script_kernels.qcsp(tokens, relevance, keep)
        for b in range(2):
            own = set(mask[b].nonzero()[:, 0].tolist())
            others = [i for i in order[b].tolist() if i not in own]
            assert kept[b].tolist() == sorted([*own, *others[: keep - len(own)]])
    else:
        mask, _ = script_kernels.gsp(tokens, 90 - 22)
        order, _ = script_kernels.qcsp(tokens, relevance, 2 * keep)
        assert torch.equal(kept, script_kernels.mask_intersect(order, mask, keep))
    starts = torch.tensor([0, 90, 180], dtype=torch.int32)
    flat = None if other is None else other.flatten(0, 1)
    packed = script_kernels.prune_varlen(tokens.flatten(0, 1), starts, query, [keep, keep], aligned=flat, **options)
    assert torch.equal(packed.view(2, keep) - starts[:-1, None], kept)
    arrays = {"aligned": None if other is None else other.numpy(), **options}
    assert_same(script_numpy.prune(tokens.numpy(), query.numpy(), keep, **arrays), kept)


@given(problem=prunings(), rounds=st.sampled_from([1, 3]))
def test_a_union_keeps_what_its_definition_says(problem, rounds):
    tokens, query, keep, options = problem
    options = {**options, "combine": "union", "rounds": rounds}
    share = (keep + 1) // 2
    if rounds_needed(tokens.shape[1], share) > 100:
        return
    kept = script_kernels.prune(tokens, query, keep, **options)
    graph = GspOptions(**{name: options[name] for name in ("threshold", "gamma", "min_degree", "rounds")})
    needed = max(rounds, rounds_needed(tokens.shape[1], share))
    mask, _ = script_kernels.gsp(
        tokens, share, threshold=graph.threshold, gamma=graph.gamma, min_degree=graph.min_degree, rounds=needed
    )
    assert mask.gather(1, kept).sum(1).tolist() == [share] * len(tokens)
    exact = reference.prune(tokens, query, keep, dtype=torch.float64, **options)
    for b in range(len(tokens)):
        if keep <= 2 and testing.gsp_is_clear_cut(
            tokens[b : b + 1], share, GspOptions(**{**graph.__dict__, "rounds": needed})
        ):
            assert set(mask[b].nonzero()[:, 0].tolist()) <= set(exact[b].tolist())


def test_a_union_out_of_reach_names_the_half():
    tokens = torch.ones(1, 400, 4)
    message = "keep: the half of 2 that GSP keeps in a union, 1, of N = 400 tokens cannot be reached with rounds = 100"
    for call in (script_kernels.prune, torch.ops.script.prune):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call(tokens, None, 2, combine="union")
    starts = torch.tensor([0, 400], dtype=torch.int32)
    for call in (script_kernels.prune_varlen, torch.ops.script.prune_varlen):
        with pytest.raises((ValueError, RuntimeError), match=message.replace("keep:", r"keep\[0\]:")):
            call(tokens[0], starts, None, [2], combine="union")
