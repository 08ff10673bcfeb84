"""Methods by name: each against a plain reference or a step-wise certificate, and what all of them promise."""

import math

import pytest
import torch

import script_kernels
from script_kernels import methods
from script_kernels.methods.dpp import weighted
from script_kernels.reference import kernel_matrix, released_prune
from script_kernels.testing import certify

B, N, D, K = 2, 60, 24, 13


def example(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, N, D, generator=generator) * (1 + torch.rand(B, N, 1, generator=generator))
    return tokens.to(dtype), torch.rand(B, N, generator=generator)


def order_of(kernel64, kept):
    """The greedy order of a kept set: what a certificate can walk. Only for sets that are a greedy sequence's."""
    residual, rows, order = kernel64.diagonal().clone(), [], []
    left = set(kept.tolist())
    while left:
        pick = max(sorted(left), key=lambda i: float(residual[i]))
        row = kernel64[pick] - sum((r[pick] * r for r in rows), torch.zeros_like(residual))
        rows.append(row / residual[pick].clamp(min=1e-300).sqrt())
        residual = residual - rows[-1] ** 2
        left.remove(pick)
        order.append(pick)
    return torch.tensor(order)


def greedy_holds(kernel64, kept, tolerance=1e-5):
    """Whether `kept` is the set of a greedy sequence for this float64 kernel: no pick is beaten by a token left."""
    residual, rows = kernel64.diagonal().clone(), []
    free = torch.ones(len(residual), dtype=torch.bool)
    for pick in order_of(kernel64, kept).tolist():
        if residual[free].max() > residual[pick] + tolerance * kernel64.diagonal().max():
            return False
        row = kernel64[pick] - sum((r[pick] * r for r in rows), torch.zeros_like(residual))
        rows.append(row / residual[pick].clamp(min=1e-300).sqrt())
        residual = residual - rows[-1] ** 2
        free[pick] = False
    return True


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_keeps_distinct_ascending_indices_whatever_comes(name, dtype):
    tokens, relevance = example(dtype=dtype)
    tokens[0, 3:40] = tokens[0, 2]  # duplicates: fewer directions than are kept
    tokens[1, 5] = 0
    relevance[1] = 0.5
    for r in (relevance, None):
        for keep in (1, K, N - 1, N):
            kept = methods.select(tokens, r, keep, method=name, **({"gsp_drop": 0.0} if name == "script" else {}))
            assert kept.dtype == torch.int64
            assert kept.shape == (B, keep)
            assert (kept[:, 1:] > kept[:, :-1]).all()
            assert kept.min() >= 0
            assert kept.max() < N
            alone = methods.METHODS[name](tokens[:1], None if r is None else r[:1], keep)
            assert torch.equal(alone, methods.METHODS[name](tokens, r, keep)[:1])


@pytest.mark.parametrize(
    "name", sorted(set(methods.METHODS) - {"stride", "random", "released_script", "gsp", "tome_drop"})
)
def test_a_token_with_a_nan_goes_last(name):
    tokens, relevance = example()
    tokens[:, 7, 3] = math.nan
    options = {"gsp_drop": 0.0} if name == "script" else {}
    for knobs in ({}, {"mix": 0.5}) if name in ("cdpruner", "script") else ({},):
        kept = methods.select(tokens, relevance, N - 1, method=name, **options, **knobs)
        assert (kept != 7).all()


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - methods.NEEDS_RELEVANCE))
def test_the_others_leave_the_relevance_alone(name):
    tokens, relevance = example()
    assert torch.equal(methods.select(tokens, relevance, K, method=name), methods.select(tokens, None, K, method=name))


@pytest.mark.parametrize(
    "knobs",
    [{}, {"power": 3.0}, {"mix": 0.3}, {"floor": 0.4}, {"negate": True}, {"power": 2.0, "mix": 0.6, "floor": 0.2}],
)
def test_the_kernel_of_cdpruner_is_the_one_its_knobs_describe(knobs):
    tokens, relevance = example()
    kept = methods.select(tokens, relevance, K, method="cdpruner", **knobs)
    r = 1 - relevance.double() if knobs.get("negate") else relevance.double()
    r = (knobs.get("floor", 0) + (1 - knobs.get("floor", 0)) * r) ** knobs.get("power", 1.0)
    x = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    mix = knobs.get("mix", 1.0)
    for b in range(B):
        kernel = x[b] @ x[b].T * ((1 - mix) + mix * r[b][:, None] * r[b])
        assert greedy_holds(kernel, kept[b])
        assert not greedy_holds(kernel, torch.arange(K))
    made = weighted(tokens, relevance, knobs.get("power", 1.0), mix, knobs.get("floor", 0.0), "negate" in knobs)
    expected = (x @ x.mT) * ((1 - mix) + mix * r[:, :, None] * r[:, None])
    torch.testing.assert_close(
        kernel_matrix(made.rows, made.relevance.double() ** made.power, dtype=torch.float64),
        expected,
        atol=1e-6,
        rtol=0,
    )


def test_cdpruner_s_order_passes_the_certificate():
    from script_kernels import qcsp

    tokens, relevance = example()
    kernel = kernel_matrix(tokens, relevance, dtype=torch.float64)
    order, _ = qcsp(tokens, relevance, K)
    assert torch.equal(order.sort(1).values, methods.select(tokens, relevance, K, method="cdpruner"))
    for b in range(B):
        certify(kernel[b : b + 1], order[b : b + 1])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_resprune_takes_the_largest_weighted_energy_outside_the_span(alpha):
    tokens, relevance = example()
    kept = methods.select(tokens, relevance, K, method="resprune", alpha=alpha)
    rows = tokens.double() * relevance.double()[..., None] ** (alpha / 2)
    for b in range(B):
        assert greedy_holds(rows[b] @ rows[b].T, kept[b])
    unit = rows / tokens.double().norm(dim=-1, keepdim=True)
    assert not all(greedy_holds(unit[b] @ unit[b].T, kept[b]) for b in range(B))  # raw norms matter


def test_otprune_maximises_its_log_det_greedily():
    tokens, _ = example()
    kept = methods.select(tokens, None, K, method="otprune", gamma=0.5)
    for b in range(B):
        x = tokens[b].double()
        x = x / x.norm(dim=0, keepdim=True)
        gram = x @ x.T
        kernel = torch.eye(N, dtype=torch.float64) + 0.5 * gram @ gram.T
        assert greedy_holds(kernel, kept[b])
        assert not greedy_holds(kernel, torch.arange(K))


def test_divprune_is_farthest_point_first():
    tokens, _ = example()
    order, _ = script_kernels.max_min(tokens, None, K)
    assert torch.equal(order.sort(1).values, methods.select(tokens, None, K, method="divprune"))
    for b in range(B):
        x = tokens[b].double()
        x = x / x.norm(dim=-1, keepdim=True)
        distance = 1 - x @ x.T
        alone = distance.clone().fill_diagonal_(9).amin(1)
        assert alone[order[b, 0]] >= alone.max() - 1e-5
        for t in range(1, K):
            near = distance[order[b, :t]].amin(0)
            near[order[b, :t]] = -1
            assert near[order[b, t]] >= near.max() - 1e-5


@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_mmr_trades_relevance_for_similarity(balance):
    tokens, relevance = example()
    order, _ = script_kernels.mmr(tokens, relevance, K, balance=balance)
    kept = methods.select(tokens, relevance, K, method="mmr", balance=balance)
    assert torch.equal(order.sort(1).values, kept)
    for b in range(B):
        x = tokens[b].double()
        x = x / x.norm(dim=-1, keepdim=True)
        for t in range(K):
            nearest = (x @ x[order[b, :t]].T).amax(1) if t else torch.zeros(N, dtype=torch.float64)
            score = balance * relevance[b].double() - (1 - balance) * nearest
            score[order[b, :t]] = -9
            assert score[order[b, t]] >= score.max() - 1e-5


def test_script_with_nothing_dropped_is_cdpruner_and_with_no_query_the_op_prune():
    tokens, relevance = example()
    same = methods.select(tokens, relevance, K, gsp_drop=0.0)
    assert torch.equal(same, methods.select(tokens, relevance, K, method="cdpruner"))
    for combine in ("intersect", "restrict"):
        for drop in (0.25, 0.5):
            kept = methods.select(tokens, None, K, combine=combine, gsp_drop=drop)
            assert torch.equal(kept, script_kernels.prune(tokens, None, K, combine=combine, gsp_drop=drop))


@pytest.mark.parametrize("keep", [1, K, N])
def test_survivors_are_a_multiple_of_what_is_kept(keep):
    from script_kernels import gsp, qcsp
    from script_kernels.options import rounds_needed

    tokens, relevance = example()
    kept = methods.select(tokens, relevance, keep, survivors=1.5, combine="restrict")
    left = min(N, max(math.ceil(1.5 * keep), math.ceil(N / 16)))
    mask, _ = gsp(tokens, left, rounds=rounds_needed(N, left))
    for b in range(B):
        alive = mask[b].nonzero()[:, 0]
        assert len(alive) == left
        order, _ = qcsp(tokens[b, alive][None], relevance[b, alive][None], keep)
        assert torch.equal(kept[b], alive[order[0]].sort().values)
    joined = methods.select(tokens, relevance, keep, survivors=1.5, oversample=N / keep)  # the whole ranking meets them
    assert all(mask[b, joined[b]].all() for b in range(B))


@pytest.mark.parametrize("n", [1, 2, 17, 576, 8192])
def test_any_count_of_tokens_has_its_survivors(n):
    tokens = torch.randn(1, n, 8)
    for keep in {1, min(n, 64), n}:
        for survivors in (1.0, 2.5):
            assert methods.select(tokens, None, keep, survivors=survivors, combine="restrict").shape == (1, keep)


def test_the_union_gives_half_to_the_graph_and_the_rest_to_the_order():
    from script_kernels import gsp, qcsp
    from script_kernels.options import rounds_needed

    tokens, relevance = example()
    half = (K + 1) // 2
    mask, _ = gsp(tokens, half, rounds=rounds_needed(N, half))
    order, _ = qcsp(tokens, relevance, K)
    kept = methods.select(tokens, relevance, K, combine="union")
    for b in range(B):
        graph = set(mask[b].nonzero()[:, 0].tolist())
        others = [i for i in order[b].tolist() if i not in graph]
        assert set(kept[b].tolist()) == graph | set(others[: K - len(graph)])


def test_the_simple_ones_against_five_lines():
    tokens, relevance = example()
    assert torch.equal(
        methods.select(tokens, relevance, K, method="relevance"), relevance.topk(K).indices.sort(1).values
    )
    assert methods.select(tokens, None, 4, method="stride")[0].tolist() == [7, 22, 37, 52]
    assert torch.equal(
        methods.select(tokens, relevance, K, method="released_script"), released_prune(tokens, relevance, K)
    )
    first, second = (methods.select(tokens, None, K, method="random", seed=s) for s in (0, 1))
    assert not torch.equal(first, second)
    x = tokens[0].double() / tokens[0].double().norm(dim=-1, keepdim=True)
    left = list(range(N))
    while len(left) > K:
        near = (x[left[0::2]] @ x[left[1::2]].T).amax(1)
        gone = near.argsort(descending=True)[: min(len(left) - K, len(left) // 2)].tolist()
        left = [t for n, t in enumerate(left) if n % 2 or n // 2 not in gone]
    assert methods.select(tokens, None, K, method="tome_drop")[0].tolist() == left
    norm = tokens[0].double().norm(dim=-1)
    chosen = sorted(norm.topk(3).indices.tolist())
    kept, budget = set(chosen), K - 3
    for n, pivot in enumerate(chosen):
        share = math.ceil(budget / (3 - n))
        budget -= share
        kept |= set(sorted((t for t in range(N) if t not in kept), key=lambda t: float(x[t] @ x[pivot]))[:share])
    assert set(methods.select(tokens, None, K, method="dart", pivots=3)[0].tolist()) == kept


def test_a_callable_is_checked():
    tokens, relevance = example()

    def last(tokens, relevance, keep):
        return torch.arange(N - 1, N - 1 - keep, -1).repeat(len(tokens), 1)

    assert methods.select(tokens, relevance, 3, method=last)[0].tolist() == [N - 3, N - 2, N - 1]
    wrong = {
        "distinct": lambda t, r, k: torch.zeros(B, k, dtype=torch.int64),
        "shape": lambda t, r, k: torch.zeros(B, k + 1, dtype=torch.int64),
        r"0\.\.59": lambda t, r, k: torch.arange(k).repeat(B, 1) + N,
    }
    for message, method in wrong.items():
        with pytest.raises(ValueError, match=message):
            methods.select(tokens, relevance, 3, method=method)
    with pytest.raises(TypeError, match="int64"):
        methods.select(tokens, relevance, 3, method=lambda t, r, k: torch.rand(B, k))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "divprun"}, ValueError, "method: expected a callable or one of script"),
        ({"method": 3}, TypeError, "method: expected a name or a callable, got int"),
        ({"keep": 0}, ValueError, "1 <= k"),
        ({"keep": N + 1}, ValueError, "1 <= k"),
        ({"power": -1.0}, ValueError, "power: expected 0 <= power"),
        ({"survivors": 0.5}, ValueError, "survivors: expected 1 <= survivors"),
        ({"mix": 1.5}, ValueError, "mix: expected 0 <= mix <= 1"),
        ({"floor": math.nan}, ValueError, "floor: expected a finite number"),
        ({"combine": "both"}, ValueError, "combine: expected one of intersect, restrict, union"),
        ({"combine": "restrict", "gsp_drop": 0.5, "keep": 40}, ValueError, "keep: expected keep <= 30"),
        ({"relevance": torch.ones(B, N + 1)}, ValueError, "relevance"),
        ({"tokens": torch.ones(N, D)}, ValueError, "tokens: expected shape"),
    ],
)
def test_bad_arguments_name_themselves(options, error, message):
    tokens, relevance = example()
    given = {"tokens": tokens, "relevance": relevance, "keep": K, **options}
    with pytest.raises(error, match=message):
        methods.select(given.pop("tokens"), given.pop("relevance"), given.pop("keep"), **given)
