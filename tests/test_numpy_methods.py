"""Methods by name on NumPy arrays: those of `script_kernels.methods`, without PyTorch."""

import inspect
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from test_methods import greedy_holds

import script_kernels.numpy as script_numpy
from script_kernels import array_focus, array_methods, methods, testing

B, N, D, K = 2, 60, 24, 13
# Every option whose rows and relevance reach the core with the same bits, so that it gives the same ones. What goes
# through a sum or a power of NumPy's (`mix`, otprune) is told right by the certificate alone, below.
EXACT = [
    ("script", {}),
    ("script", {"combine": "restrict", "survivors": 2.0, "floor": 0.3}),
    ("script", {"combine": "restrict", "gsp_drop": 0.5, "rounds": 2, "power": 2.0}),
    ("script", {"combine": "union", "floor": 0.6, "ridge": 0.1}),
    ("script", {"survivors": 1.5, "oversample": 3.0, "threshold": 0.1, "gamma": 0.5, "min_degree": 2}),
    ("script", {"combine": "restrict", "survivors": 2.0, "negate": True}),
    ("script", {"split": "checker", "grid_width": 10, "combine": "restrict", "gsp_drop": 0.5}),
    ("script", {"split": "checker", "grid_width": 6, "combine": "union"}),
    ("cdpruner", {}),
    ("cdpruner", {"power": 0.5, "floor": 0.4, "ridge": 0.2}),
    ("cdpruner", {"negate": True}),
    ("dpp", {"ridge": 0.3}),
    ("resprune", {"alpha": 3.0}),
    ("divprune", {}),
    ("mmr", {"balance": 0.3}),
    ("relevance", {}),
    ("relevance", {"negate": True}),
    ("gsp", {"gamma": 0.5}),
    ("gsp", {"split": "checker", "grid_width": 6, "rounds": 9}),
    ("stride", {}),
    ("random", {"seed": 2**40 + 7}),
]


def example(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((B, N, D)) * (1 + rng.random((B, N, 1)))
    return tokens.astype(np.float32), rng.random((B, N)).astype(np.float32)


def by_torch(tokens, relevance, keep, **options):
    wide = torch.from_numpy(tokens.astype(np.float32))
    if tokens.dtype.name == "bfloat16":
        wide = wide.bfloat16()
    r = None if relevance is None else torch.from_numpy(relevance)
    return methods.select(wide, r, keep, **options).numpy()


@pytest.mark.parametrize(("method", "options"), EXACT)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_method_gives_the_indices_of_its_namesake(method, options, dtype):
    tokens, relevance = example()
    tokens = tokens.astype(dtype)
    tokens[1, 4] = tokens[1, 30]
    tokens[1, 9, 3] = np.nan
    for r in (relevance, None):
        for keep in (1, K, N // 2):
            kept = script_numpy.select(tokens, r, keep, method=method, threads=2, **options)
            expected = by_torch(tokens, r, keep, method=method, **options)
            assert kept.dtype == np.int64
            assert kept.tobytes() == expected.tobytes()


GRIDS = ([(12, 5)], [(3, 8), (6, 6)], [(1, 1), (59, 1)], [(5, 4)] * 3)


@pytest.mark.parametrize("kind", testing.KINDS)
def test_focus_chooses_as_its_namesake(kind):
    """Its sums are NumPy's own, so that only tokens whose scores are clearly apart are chosen alike: as here."""
    differ = 0
    for seed, grids in enumerate(GRIDS):
        tokens = testing.make_tokens(kind, B, N, D, seed=seed).numpy()
        relevance, above = (testing.make_relevance(B, N, seed=seed + n).numpy() ** 4 for n in (0, 9))
        for keep, told in ((2, {}), (5, {}), (K, {}), (K, {"near": 7}), (K, {"negate": True}), (N // 2, {"most": 0.8})):
            told = {"grids": grids, "above": above, **told}
            kept = script_numpy.select(tokens, relevance, keep, method="focus", threads=2, **told)
            told["above"] = torch.from_numpy(above)
            assert kept.tolist() == by_torch(tokens, relevance, keep, method="focus", **told).tolist()
            differ += kept.tolist() != script_numpy.select(tokens, relevance, keep, method="focus").tolist()
        tokens[:, 5:30, 2] = np.nan  # what is bad spreads nothing
        kept = script_numpy.select(tokens, relevance, K, method="focus", grids=grids)
        assert kept.tolist() == by_torch(tokens, relevance, K, method="focus", grids=grids).tolist()
        tokens = np.nan_to_num(tokens)
        for none in ({"grids": None}, {"grids": grids}):
            how = {"combine": "restrict", "survivors": 2.0, "floor": 0.3}
            kept = script_numpy.select(tokens, None, K, method="focus", **none)
            assert kept.tolist() == script_numpy.select(tokens, None, K, **how).tolist()
    assert differ


def test_focus_keeps_so_many_of_whatever_comes_in(monkeypatch):
    tokens, relevance = example()
    tokens[0, :50, 3], relevance[1, 5] = np.nan, np.inf
    tokens[1] = np.nan
    for keep in (1, K, N - 1, N):
        kept = script_numpy.select(tokens, relevance, keep, method="focus", grids=[(6, 10)])
        assert kept.shape == (B, keep)
        assert (np.diff(kept, axis=1) > 0).all()
    assert script_numpy.select(tokens[:0], relevance[:0], K, method="focus", grids=[(6, 10)]).shape == (0, K)
    tokens, relevance = example(1)
    whole = script_numpy.select(tokens, relevance, K, method="focus", grids=[(6, 10)])
    monkeypatch.setattr(array_focus, "MOST", 7 * N)
    assert (script_numpy.select(tokens, relevance, K, method="focus", grids=[(6, 10)]) == whole).all()
    for bad, message in (
        ({"grids": [(6, 9)]}, "grids: expected N = 60 tokens in them, got 54"),
        ({"above": relevance[:, 1:]}, r"above: expected shape \(2, 60\), got \(2, 59\)"),
        ({"near": -1}, "near: expected near >= 0, got -1"),
        ({"most": 0.9}, "most: expected least <= most <= 1 - typical"),
    ):
        with pytest.raises(ValueError, match=message):
            script_numpy.select(tokens, relevance, K, method="focus", **bad)


@pytest.mark.parametrize("reduce", ["mean", "max", "above"])
@pytest.mark.parametrize("negate", [False, True])
def test_relevance_is_that_of_the_methods(reduce, negate):
    tokens, _ = example()
    tokens[0, 3, 1] = np.nan
    query = np.random.default_rng(5).standard_normal((1, 7, D)).astype(np.float32)
    mask = np.array([[True, True, False, True, True, True, False]])
    for q, m in ((query, None), (query, mask), (query[:, :1], None), (np.full_like(query, np.nan), None)):
        found = array_focus.relevance_of(tokens, q, m, reduce=reduce, negate=negate)
        given = [torch.from_numpy(x) if x is not None else None for x in (tokens, q, m)]
        expected = methods.relevance_of(*given, reduce=reduce, negate=negate)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="reduce: expected"):
        array_focus.relevance_of(tokens, query, reduce="sum")


@pytest.mark.parametrize(
    "knobs", [{"mix": 0.3}, {"power": 2.0, "mix": 0.6, "floor": 0.2}, {"mix": 0.8, "negate": True}]
)
@pytest.mark.parametrize("method", ["cdpruner", "script"])
def test_a_mixture_passes_the_certificate(method, knobs):
    tokens, relevance = example()
    drop = {"gsp_drop": 0.0} if method == "script" else {}
    kept = torch.from_numpy(script_numpy.select(tokens, relevance, K, method=method, **knobs, **drop))
    r = 1 - relevance.astype(float) if knobs.get("negate") else relevance.astype(float)
    r = (knobs.get("floor", 0) + (1 - knobs.get("floor", 0)) * r) ** knobs.get("power", 1)
    x = tokens / np.linalg.norm(tokens.astype(float), axis=-1, keepdims=True)
    for b in range(B):
        kernel = x[b] @ x[b].T * (1 - knobs["mix"] + knobs["mix"] * np.outer(r[b], r[b]))
        assert greedy_holds(torch.from_numpy(kernel), kept[b])
        assert not greedy_holds(torch.from_numpy(kernel), torch.arange(K))


def test_otprune_passes_the_certificate():
    tokens, _ = example()
    kept = torch.from_numpy(script_numpy.select(tokens, None, K, method="otprune", gamma=0.5))
    for b in range(B):
        x = tokens[b].astype(float) / np.linalg.norm(tokens[b].astype(float), axis=0)
        gram = x @ x.T
        kernel = torch.from_numpy(np.eye(N) + 0.5 * gram @ gram.T)
        assert greedy_holds(kernel, kept[b])
        assert not greedy_holds(kernel, torch.arange(K))


@pytest.mark.parametrize("method", ["cdpruner", "otprune", "relevance", "script", "mmr"])
def test_a_token_with_a_nan_goes_last(method):
    tokens, relevance = example()
    tokens[:, 7, 3] = np.nan
    options = {"otprune": {}, "relevance": {}, "mmr": {}}.get(method, {"mix": 0.5})
    options |= {"gsp_drop": 0.0} if method == "script" else {}
    assert (script_numpy.select(tokens, relevance, N - 1, method=method, **options) != 7).all()


@pytest.mark.parametrize("method", array_methods.METHODS)
def test_options_and_defaults_are_those_of_the_namesake(method):
    theirs = inspect.signature(methods.METHODS[method]).parameters.values()
    assert array_methods.options_of(method) == {p.name: p.default for p in theirs if p.kind is p.KEYWORD_ONLY}
    handed = {p.name for p in theirs if p.kind is p.VAR_KEYWORD}
    own = inspect.signature(array_methods.METHODS[method]).parameters.values()
    assert handed == {p.name for p in own if p.kind is p.VAR_KEYWORD}


def test_every_method_is_here_or_known_to_be_elsewhere():
    assert [name for name in methods.METHODS if name not in array_methods.ELSEWHERE] == list(array_methods.METHODS)
    tokens, relevance = example()
    for name in array_methods.ELSEWHERE:
        with pytest.raises(ValueError, match=f"got '{name}', which needs script_kernels.methods"):
            script_numpy.select(tokens, relevance, K, method=name)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "divprun"},
        {"method": 3},
        {"power": -1.0},
        {"survivors": 0.5},
        {"mix": 1.5},
        {"floor": float("nan")},
        {"ridge": -0.1},
        {"combine": "both"},
        {"combine": "restrict", "gsp_drop": 0.5, "keep": 40},
        {"reduce": "max"},
        {"split": "checker"},
        {"split": "checker", "grid_width": 7},
        {"method": "gsp", "grid_width": 6},
        {"method": "mmr", "balance": 2.0},
        {"method": "random", "seed": -1},
        {"method": "cdpruner", "power": "1"},
        {"method": "gsp", "rounds": 1.5},
    ],
)
def test_bad_arguments_are_told_in_the_same_words(options):
    tokens, relevance = example()
    given = {"keep": K, **options}
    with pytest.raises((TypeError, ValueError)) as ours:
        script_numpy.select(tokens, relevance, **given)
    with pytest.raises((TypeError, ValueError)) as theirs:
        by_torch(tokens, relevance, **given)
    assert ours.type is theirs.type
    assert str(ours.value).split(":")[0] == str(theirs.value).split(":")[0]
    if options not in ({"method": "divprun"}, {"reduce": "max"}):  # which say what there is on this face
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("method", ["script", "stride", "random"])
def test_arguments_that_fit_no_method(method):
    tokens, relevance = example()
    for keep in (0, N + 1):
        with pytest.raises(ValueError, match=f"keep: expected 1 <= keep <= N = {N}"):
            script_numpy.select(tokens, relevance, keep, method=method)
    with pytest.raises(ValueError, match="relevance: expected shape"):
        script_numpy.select(tokens, relevance[:, 1:], K, method=method)
    with pytest.raises(ValueError, match="tokens: expected shape"):
        script_numpy.select(tokens[0], relevance, K, method=method)
    with pytest.raises(ValueError, match="threads: expected threads >= 1"):
        script_numpy.select(tokens, relevance, K, method=method, threads=0)
    with pytest.raises(TypeError, match="wrong"):
        script_numpy.select(tokens, relevance, K, method=method, wrong=1)


def test_numbers_of_numpy_are_numbers():
    tokens, relevance = example()
    given = {"floor": np.float32(0.25), "survivors": np.float64(2), "rounds": np.int64(2), "combine": "restrict"}
    kept = script_numpy.select(tokens, relevance, np.int32(K), **given)
    plain = {"floor": 0.25, "survivors": 2.0, "rounds": 2, "combine": "restrict"}
    assert (kept == script_numpy.select(tokens, relevance, K, **plain)).all()


def test_a_batch_of_none():
    tokens, relevance = example()
    for method in array_methods.METHODS:
        assert script_numpy.select(tokens[:0], relevance[:0], K, method=method).shape == (0, K)


def test_a_callable_is_checked():
    tokens, relevance = example()

    def last(tokens, relevance, keep, *, shift=0):
        return np.tile(np.arange(N - 1, N - 1 - keep, -1), (len(tokens), 1)) - shift

    assert script_numpy.select(tokens, relevance, 3, method=last, shift=2)[0].tolist() == [N - 5, N - 4, N - 3]
    wrong = {
        "distinct": lambda t, r, k: np.zeros((B, k), np.int64),
        "shape": lambda t, r, k: np.zeros((B, k + 1), np.int64),
        r"0\.\.59": lambda t, r, k: np.tile(np.arange(k), (B, 1)) + N,
    }
    for message, method in wrong.items():
        with pytest.raises(ValueError, match=message):
            script_numpy.select(tokens, relevance, 3, method=method)
    for method in (lambda t, r, k: np.zeros((B, k)), lambda t, r, k: [[0] * k] * B):
        with pytest.raises(TypeError, match="method: expected"):
            script_numpy.select(tokens, relevance, 3, method=method)


def test_no_method_needs_pytorch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import script_kernels.numpy as sk
from script_kernels.array_methods import METHODS
tokens = np.random.default_rng(0).standard_normal((1, 48, 8), dtype=np.float32)
for name in METHODS:
    assert sk.select(tokens, None, 12, method=name).shape == (1, 12)
assert sk.select(tokens, None, 12).shape == (1, 12)
"""
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
