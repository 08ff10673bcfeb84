"""prune against the composition of the ops under it, and against its float64 oracle where rounding cannot decide."""

import functools
import math

import pytest
import torch

from script_kernels import reference, testing
from script_kernels.options import GspOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "default": {},
    "restrict": {"combine": "restrict"},
    "all options": {"gsp_drop": 0.4, "oversample": 1.5, "threshold": 0.1, "gamma": 2.0, "min_degree": 2, "rounds": 2},
    "many rounds": {"gsp_drop": 0.7, "rounds": 5, "combine": "restrict"},
    "no graph stage": {"gsp_drop": 0.0},
    "no oversampling": {"oversample": 1.0},
    "floor": {"floor": 0.6},
}


def gsp_options(options):
    return {name: options[name] for name in ("threshold", "gamma", "min_degree", "rounds") if name in options}


def survivors_of(n, options):
    return n - math.floor(options.get("gsp_drop", 0.25) * n)


def compose(backend, tokens, query, keep, *, aligned=None, query_mask=None, negate=False, **options):
    """prune of tokens without bad rows, from the other ops and their results only."""
    B, N, _ = tokens.shape
    relevance = torch.ones(B, N, device=tokens.device)
    if query is not None:
        relevance = backend.query_relevance(tokens if aligned is None else aligned, query, query_mask, negate=negate)
        relevance = options.get("floor", 0.0) + (1 - options.get("floor", 0.0)) * relevance
    mask, _ = backend.gsp(tokens, survivors_of(N, options), **gsp_options(options))
    if options.get("combine", "intersect") == "intersect":
        ranking, _ = backend.qcsp(tokens, relevance, min(N, math.ceil(options.get("oversample", 2.0) * keep)))
        return backend.mask_intersect(ranking, mask, keep)
    kept = []
    for b in range(B):
        left = mask[b].nonzero()[:, 0]
        picks, _ = backend.qcsp(tokens[b : b + 1, left], relevance[b : b + 1, left], keep)
        kept.append(left[picks[0]].sort().values)
    return torch.stack(kept)


def is_clear_cut(tokens, relevance, keep, options):
    """Whether float32 rounding cannot change what prune keeps of tokens (1, N, D)."""
    n = tokens.shape[1]
    if not testing.gsp_is_clear_cut(tokens, survivors_of(n, options), GspOptions(**gsp_options(options))):
        return False
    kernel64 = testing.kernel64(tokens, relevance)[0]
    if options.get("combine") == "restrict":
        mask, _ = reference.gsp(tokens, survivors_of(n, options), dtype=torch.float64, **gsp_options(options))
        kernel64, picks = kernel64[mask[0]][:, mask[0]], keep
    else:
        picks = min(n, math.ceil(options.get("oversample", 2.0) * keep))
    return testing.greedy_margin(kernel64, picks) > 5e-5


@functools.cache
def clear_cut_batch(kind, n, d, keep, case, *, dtype=torch.float32, queries=3):
    """Two images, and their queries, on which every decision is clear of rounding."""
    found, options = [], CASES[case]
    for seed in range(400):
        tokens = testing.make_tokens(kind, 1, n, d, dtype=dtype, seed=seed)
        if kind == "photo":
            tokens = tokens[:, torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        query = testing.make_query(1, queries, d, dtype=dtype, seed=seed)
        floor = options.get("floor", 0.0)
        relevance = floor + (1 - floor) * reference.query_relevance(tokens, query, dtype=torch.float64)
        if is_clear_cut(tokens, relevance, keep, options):
            found.append((tokens, query))
            if len(found) == 2:
                return tuple(torch.cat(part) for part in zip(*found, strict=True))
    raise AssertionError("no two clear-cut images in 400 seeds")


def assert_selection(indices, B, N, keep):
    assert indices.dtype == torch.int64
    assert indices.shape == (B, keep)
    assert (indices.diff(dim=1) > 0).all()
    assert ((indices >= 0) & (indices < N)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(backend, kind, dtype, case):
    options = CASES[case]
    tokens, query = clear_cut_batch(kind, 64, 40, 12, case, dtype=dtype)
    expected = reference.prune(tokens, query, 12, dtype=torch.float64, **options)
    kept = backend.prune(tokens.to(backend.device), query.to(backend.device), 12, **options)
    assert_selection(kept, 2, 64, 12)
    assert torch.equal(kept.cpu(), expected)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_composition(backend, kind, case, negate):
    options = CASES[case]
    tokens, query = (t.to(backend.device) for t in clear_cut_batch(kind, 81, 40, 12, case))
    if not negate:
        expected = compose(backend, tokens, query, 12, **options)
        assert torch.equal(backend.prune(tokens, query, 12, **options), expected)
    # cos(x, -q) = -cos(x, q), exactly
    expected = compose(backend, tokens, -query, 12, negate=negate, **options)
    if negate:
        assert torch.equal(backend.prune(tokens, -query, 12, negate=True, **options), expected)
        assert torch.equal(backend.prune(tokens, query, 12, **options), expected)


@pytest.mark.parametrize("combine", ["intersect", "restrict"])
class TestArguments:
    def test_a_floor_of_one_leaves_the_question_out(self, backend, combine):
        tokens = testing.make_tokens("clustered", 2, 64, 48, device=backend.device)
        query = testing.make_query(2, 3, 48, device=backend.device)
        kept = backend.prune(tokens, query, 12, floor=1.0, combine=combine)
        assert torch.equal(kept, backend.prune(tokens, None, 12, combine=combine))
        assert not torch.equal(kept, backend.prune(tokens, query, 12, combine=combine))

    def test_no_query_is_relevance_of_one(self, backend, combine):
        tokens = testing.make_tokens("clustered", 2, 64, 48, device=backend.device)
        expected = compose(backend, tokens, None, 16, combine=combine)
        assert torch.equal(backend.prune(tokens, None, 16, combine=combine), expected)

    def test_aligned_tokens_meet_the_query(self, backend, combine):
        tokens = testing.make_tokens("clustered", 2, 64, 48, device=backend.device)
        aligned = testing.make_tokens("gaussian", 2, 64, 20, seed=5, device=backend.device)
        query = testing.make_query(2, 4, 20, device=backend.device)
        expected = compose(backend, tokens, query, 16, aligned=aligned, combine=combine)
        assert torch.equal(backend.prune(tokens, query, 16, aligned=aligned, combine=combine), expected)

    def test_query_mask(self, backend, combine):
        tokens = testing.make_tokens("clustered", 2, 64, 48, device=backend.device)
        query = testing.make_query(2, 4, 48, device=backend.device)
        mask = torch.tensor([[True, False, False, True], [False, True, True, False]], device=backend.device)
        expected = compose(backend, tokens, query, 16, query_mask=mask, combine=combine)
        kept = backend.prune(tokens, query, 16, query_mask=mask, combine=combine)
        assert torch.equal(kept, expected)
        for b in range(2):
            alone = backend.prune(tokens[b : b + 1], query[b : b + 1, mask[b]], 16, combine=combine)
            assert torch.equal(alone[0], kept[b])

    def test_one_query_for_all_images(self, backend, combine):
        tokens = testing.make_tokens("clustered", 3, 64, 48, device=backend.device)
        query = testing.make_query(1, 2, 48, device=backend.device)
        mask = torch.tensor([[True, False]], device=backend.device)
        shared = backend.prune(tokens, query, 16, query_mask=mask, combine=combine)
        repeated = backend.prune(tokens, query.repeat(3, 1, 1), 16, query_mask=mask.repeat(3, 1), combine=combine)
        assert torch.equal(shared, repeated)

    @pytest.mark.parametrize(("n", "d", "keep"), [(1, 1, 1), (1, 4, 1), (2, 1, 1), (7, 3, 7), (64, 48, 1), (65, 1, 20)])
    def test_edges(self, backend, combine, n, d, keep):
        tokens = testing.make_tokens("gaussian", 2, n, d, device=backend.device)
        for query in (None, testing.make_query(2, 2, d, device=backend.device)):
            assert_selection(backend.prune(tokens, query, keep, combine=combine), 2, n, keep)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeping_all_gives_all(self, backend, combine, dtype):
        tokens = testing.adversarial_tokens("bad_rows", 2, 33, 8, dtype=dtype, device=backend.device)
        query = testing.make_query(1, 2, 8, dtype=dtype, device=backend.device)
        assert backend.prune(tokens, query, 33, combine=combine).tolist() == [list(range(33))] * 2

    def test_empty_batch(self, backend, combine):
        tokens, query = torch.empty(0, 10, 4, device=backend.device), torch.ones(1, 2, 4, device=backend.device)
        for q in (None, query, query[:0]):
            kept = backend.prune(tokens, q, 3, combine=combine)
            assert kept.shape == (0, 3)
            assert kept.dtype == torch.int64

    @pytest.mark.parametrize("where", ["tokens", "aligned"])
    def test_bad_tokens_are_picked_last(self, backend, combine, where):
        tokens = testing.make_tokens("gaussian", 1, 40, 12, device=backend.device)
        aligned = testing.make_tokens("gaussian", 1, 40, 6, seed=1, device=backend.device)
        query = testing.make_query(1, 2, 6, device=backend.device)
        spoiled = tokens if where == "tokens" else aligned
        spoiled[0, 3, 1], spoiled[0, 4, 0], spoiled[0, 31] = math.nan, math.inf, -math.inf
        finite = [i for i in range(40) if i not in (3, 4, 31)]
        # oversample 1: the ranking holds as many tokens as are kept, so the graph stage cannot push one out.
        options = {"aligned": aligned, "combine": combine, "oversample": 1.0}
        assert backend.prune(tokens, query, 37, **options).tolist() == [finite]
        assert backend.prune(tokens, query, 39, **options).tolist() == [sorted([*finite, 3, 4])]


def test_restrict_takes_the_rest_conditioned_on_the_survivors(backend):
    """Sources 0 and 2 are like survivors and dropped; of the rest, the one less like the survivors comes first."""
    e = torch.eye(4)
    tokens = torch.stack([e[0] + 0.1 * e[3], e[0], e[1] + 0.01 * e[3], e[1], e[2], e[2]])[None].to(backend.device)
    for keep, expected in ((3, [1, 3, 5]), (4, [0, 1, 3, 5]), (5, [0, 1, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])):
        kept = backend.prune(tokens, None, keep, gsp_drop=0.5, min_degree=0, combine="restrict")
        assert kept.tolist() == [expected]


@pytest.mark.parametrize("kind", testing.KINDS)
def test_restrict_with_more_to_keep_than_survivors(backend, kind):
    """All survivors, and of the rest what the exact greedy takes next; certified on the survivors-first order."""
    checked = 0
    for seed in range(60):
        tokens = testing.make_tokens(kind, 1, 48, 64, seed=seed)
        tokens = tokens[:, torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
        options = {"gsp_drop": 0.5, "combine": "restrict"}
        if not testing.gsp_is_clear_cut(tokens, 24, GspOptions()):
            continue
        mask = reference.gsp(tokens, 24, dtype=torch.float64)[0][0]
        kept = backend.prune(tokens.to(backend.device), None, 32, **options)[0].cpu()
        assert set(mask.nonzero()[:, 0].tolist()) <= set(kept.tolist())
        # The kernel of the rest, given the survivors, is a Schur complement.
        kernel64 = testing.kernel64(tokens)[0]
        rest = (~mask).nonzero()[:, 0]
        inside, across = kernel64[mask][:, mask], kernel64[mask][:, rest]
        if reference.dpp_map(inside[None], 24, dtype=torch.float64)[1].min() < 1e-4:
            continue  # the survivors' rank is nearly, or quite, exhausted: not all of them are conditioned on
        given = kernel64[rest][:, rest] - across.T @ torch.linalg.solve(inside, across)
        picks, _ = reference.dpp_map(given[None], 8, dtype=torch.float64)
        if testing.greedy_margin(given, 8) * float(given.diagonal().max()) <= 2e-5:
            continue
        assert sorted(rest[picks[0]].tolist()) == kept[~mask[kept]].tolist()
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", testing.ADVERSARIAL)
@pytest.mark.parametrize("combine", ["intersect", "restrict"])
def test_adversarial_tokens(backend, dtype, name, combine):
    for n, keep, rounds in ((97, 64, 1), (97, 10, 3), (30, 30, 1), (5, 2, 1)):
        tokens = testing.adversarial_tokens(name, 2, n, 16, dtype=dtype, device=backend.device)
        query = testing.adversarial_tokens(name, 2, 3, 16, dtype=dtype, seed=1, device=backend.device)
        for q in (None, query, testing.make_query(1, 1, 16, dtype=dtype, device=backend.device)):
            for gsp_drop in (0.0, 0.25, 0.5):
                kept = backend.prune(tokens, q, keep, combine=combine, rounds=rounds, gsp_drop=gsp_drop)
                assert_selection(kept, 2, n, keep)


@functools.cache
def large_clear_cut_image(n, d, keep, options):
    """(1, n, d) and a query: each token near one of d axes, so that no cosine is near a threshold of 0.5."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        axes = torch.eye(d)[torch.randint(d, (n,), generator=generator)]
        tokens = (axes + 0.02 * torch.randn(n, d, generator=generator))[None]
        query = testing.make_query(1, 1, d, seed=seed)
        relevance = reference.query_relevance(tokens, query, dtype=torch.float64)
        if is_clear_cut(tokens, relevance, keep, dict(options)):
            return tokens, query
    raise AssertionError("no clear-cut tokens in 40 seeds")


@pytest.mark.parametrize("options", [{"threshold": 0.5, "gsp_drop": 0.6, "rounds": 2}, {"threshold": 0.5}])
def test_many_tokens_against_float64(backend, options):
    """More tokens than an implementation would keep a similarity matrix for."""
    tokens, query = large_clear_cut_image(3001, 48, 8, tuple(options.items()))
    expected = reference.prune(tokens, query, 8, dtype=torch.float64, **options)
    kept = backend.prune(tokens.to(backend.device), query.to(backend.device), 8, **options)
    assert torch.equal(kept.cpu(), expected)
    keep = survivors_of(3001, options)
    expected, _ = reference.gsp(tokens, keep, dtype=torch.float64, **gsp_options(options))
    assert torch.equal(backend.gsp(tokens.to(backend.device), keep, **gsp_options(options))[0].cpu(), expected)


@pytest.mark.parametrize(("n", "keep"), [(576, 64), (577, 128), (2880, 320)])
def test_full_size(backend, n, keep):
    tokens = testing.make_tokens("photo", 1, n, 256, device=backend.device)
    query = testing.make_query(1, 8, 256, device=backend.device)
    for combine in ("intersect", "restrict"):
        assert_selection(backend.prune(tokens, query, keep, combine=combine), 1, n, keep)
