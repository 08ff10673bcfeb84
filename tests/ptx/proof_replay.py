"""Replayed calls against those of the launchers: the same bits, from other tensors than those that were recorded."""

from unittest import mock

import pytest
import torch

from ptx.launch import interpreted
from script_kernels import testing
from script_kernels.options import GspOptions, PruneOptions, QcspOptions
from script_kernels.triton.bipartite_match import launch_bipartite_match
from script_kernels.triton.dpp_map import launch_dpp_map
from script_kernels.triton.gsp import launch_gsp
from script_kernels.triton.kernels import plan, replay
from script_kernels.triton.max_min import launch_max_min
from script_kernels.triton.mmr import launch_mmr
from script_kernels.triton.prune import launch_prune
from script_kernels.triton.prune_varlen import launch_prune_varlen
from script_kernels.triton.qcsp import launch_qcsp
from script_kernels.triton.query_relevance import launch_query_relevance

slow = pytest.mark.slow


def tokens(seed, *shape):
    return testing.make_tokens("clustered", *shape, seed=seed)


def kernel(seed, n):
    return testing.kernel64(tokens(seed, 1, n, 24), testing.make_relevance(1, n, seed=seed)).float()


def ranked(seed, b, n, d):
    return tokens(seed, b, n, d), testing.make_relevance(b, n, seed=seed)


def bounds(*ends):
    return torch.tensor(ends, dtype=torch.int32)


# What is called, and with which arguments; of the tensors there are others for each seed
CALLS = {
    "relevance": (launch_query_relevance, lambda s: (tokens(s, 2, 13, 20), tokens(s + 9, 1, 3, 20))),
    "match": (launch_bipartite_match, lambda s: (tokens(s, 1, 21, 20), 0.3)),
    "gsp": (launch_gsp, lambda s: (tokens(s, 1, 21, 20), 9, GspOptions(rounds=2))),
    "dpp_map": (launch_dpp_map, lambda s: (kernel(s, 40), 7)),
    "dpp_map shared": (launch_dpp_map, lambda s: (kernel(s, 100), 5)),
    "qcsp": (launch_qcsp, lambda s: (*ranked(s, 1, 40, 20), 6)),
    "qcsp, options": (launch_qcsp, lambda s: (*ranked(s, 1, 40, 20), 6, QcspOptions(power=3.0, normalize=False))),
    "qcsp, ridge": (launch_qcsp, lambda s: (*ranked(s, 2, 30, 20), 5, QcspOptions(ridge=0.1))),
    "max_min": (launch_max_min, lambda s: (*ranked(s, 2, 30, 20), 5)),
    "max_min of tokens": (launch_max_min, lambda s: (tokens(s, 1, 30, 20), None, 5)),
    "mmr": (launch_mmr, lambda s: (*ranked(s, 2, 30, 20), 5, 0.3)),
    "prune": (launch_prune, lambda s: (tokens(s, 2, 30, 20), tokens(s + 9, 1, 3, 20), 6, PruneOptions())),
    "largest": (
        launch_prune,
        lambda s: (
            tokens(s, 2, 30, 20),
            tokens(s + 9, 1, 3, 20),
            6,
            PruneOptions(reduce="max", combine="restrict", gsp_drop=0.5),
        ),
    ),
    "union": (launch_prune, lambda s: (tokens(s, 2, 30, 20), None, 6, PruneOptions(combine="union"))),
    "varlen": (
        launch_prune_varlen,
        lambda s: (tokens(s, 1, 40, 20)[0], bounds(0, 9 + s, 40), None, [4, 5], PruneOptions()),
    ),
}
CALLS["qcsp of tokens"] = CALLS["qcsp"]
OPTIONS = {"dpp_map shared": {"columns": 64}, "qcsp of tokens": {"columns": 512, "matrix_free": True}}
OPTIONS["max_min of tokens"] = OPTIONS["qcsp of tokens"]
SLOW = {"varlen", "dpp_map shared", "relevance", "qcsp", "largest", "union", "qcsp, ridge", "max_min of tokens"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[slow] if name in SLOW else []) for name in CALLS])
def test_replayed_calls_equal_others(name):
    launch, arguments = CALLS[name]
    played, expected = [], []
    with interpreted(seed=1) as launches, mock.patch.object(plan, "SINGLE_WORK", 50_000):
        for seed in range(4):
            expected.append(launch.__wrapped__(*arguments(seed), **OPTIONS.get(name, {})))
        each, _ = divmod(len(launches), 4)
        with mock.patch.object(replay, "DEVICES", {"cpu"}), mock.patch.object(replay.Record, "play", count(played)):
            found = [launch(*arguments(seed), **OPTIONS.get(name, {})) for seed in range(4)]
    assert len(played) == 2
    assert len(launches) == 8 * each
    for x, y in zip(found, expected, strict=True):
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (x, y)), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@slow
def test_tensors_that_begin_at_one_place_are_never_replayed():
    """Which of them a pointer came from cannot be told."""
    played = []
    with (
        interpreted(seed=1),
        mock.patch.object(replay, "DEVICES", {"cpu"}),
        mock.patch.object(replay.Record, "play", count(played)),
    ):
        for seed in range(3):
            x = tokens(seed, 1, 20, 20)
            found = launch_prune(x, x, 5, PruneOptions())
            assert torch.equal(found, launch_prune.__wrapped__(x, x, 5, PruneOptions()))
    assert not played


def count(played):
    play = replay.Record.play

    def counted(self, *arguments):
        played.append(self)
        return play(self, *arguments)

    return counted
