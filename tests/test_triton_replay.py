"""What a repeated call costs the host: Python's calls, counted with a driver that launches nothing.

That replayed calls compute the same is held by their PTX, interpreted: tests/ptx/proof_replay.py.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs

from script_kernels.triton.kernels import replay

ROOT = pathlib.Path(__file__).resolve().parents[1]

COUNT = """
import json, sys, time
import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from script_kernels import targets, testing
from script_kernels.options import GspOptions, PruneOptions, QcspOptions
from script_kernels.triton.kernels import plan, replay
from script_kernels.triton.bipartite_match import launch_bipartite_match
from script_kernels.triton.dpp_map import launch_dpp_map
from script_kernels.triton.gsp import launch_gsp
from script_kernels.triton.max_min import launch_max_min
from script_kernels.triton.mmr import launch_mmr
from script_kernels.triton.prune import launch_prune
from script_kernels.triton.qcsp import launch_qcsp
from script_kernels.triton.query_relevance import launch_query_relevance


class Compiled:
    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        launched.append(arguments)


def compile_it(self, key, signature, device, constants, options, attributes, warmup):
    kernel = self.device_caches[device][0][key] = Compiled()
    return kernel


def counted(call):
    calls = [0]

    def note(frame, event, argument):
        calls[0] += event == "call"

    sys.setprofile(note)
    call()
    sys.setprofile(None)
    return calls[0] - 1  # the lambda


def seconds(call, repeats):
    call()
    best = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best.append(time.perf_counter() - start)
    return sorted(best)[len(best) // 2]


launched = []
JITFunction._do_compile = compile_it
driver._active = targets.Driver("sm_90")
plan_greedy = plan.plan_greedy
plan.plan_greedy = lambda device, *sizes, **options: plan_greedy(torch.device("meta"), *sizes, **options)

bf16 = torch.bfloat16
tokens, query = torch.zeros(1, 576, 1024, dtype=bf16), torch.zeros(1, 20, 1024, dtype=bf16)
relevance, kernel = torch.zeros(1, 576), torch.zeros(1, 576, 576)
longer = torch.zeros(1, 9000, 64, dtype=bf16)
options, graph = PruneOptions(), GspOptions()
asked = PruneOptions(reduce="max", combine="restrict", floor=0.3, gsp_drop=0.5)
union = PruneOptions(combine="union", power=2.0)
other = QcspOptions(power=2.0, normalize=False, ridge=0.1)
calls = {
    "prune": lambda: launch_prune(tokens, query, 64, options),
    "prune by the largest cosine": lambda: launch_prune(tokens, query, 64, asked),
    "prune, union": lambda: launch_prune(tokens, query, 64, union),
    "largest cosine": lambda: launch_query_relevance(tokens, query, None, False, "max"),
    "qcsp": lambda: launch_qcsp(tokens, relevance, 64),
    "qcsp with options": lambda: launch_qcsp(tokens, relevance, 64, other),
    "max_min": lambda: launch_max_min(tokens, relevance, 64),
    "max_min, longer": lambda: launch_max_min(longer, None, 64),
    "mmr": lambda: launch_mmr(tokens, relevance, 64),
    "gsp": lambda: launch_gsp(tokens, 432, graph),
    "dpp_map": lambda: launch_dpp_map(kernel, 64),
    "bipartite_match": lambda: launch_bipartite_match(tokens),
    "query_relevance": lambda: launch_query_relevance(tokens, query),
}
found = {}
for name, call in calls.items():
    replay.DEVICES = set()
    call()
    launched.clear()
    plain = counted(call)
    launches = len(launched)
    before = seconds(call, int(sys.argv[1]))
    replay.DEVICES = {"cpu"}
    call(), call(), call()
    launched.clear()
    repeated = counted(call)
    assert len(launched) == launches
    found[name] = (launches, plain, repeated, before, seconds(call, int(sys.argv[1])))
print(json.dumps(found))
"""

# op -> launches
LAUNCHES = {"prune": 6, "qcsp": 4, "gsp": 3, "dpp_map": 1, "bipartite_match": 3, "query_relevance": 3}
LAUNCHES |= {"prune by the largest cosine": 7, "prune, union": 38, "largest cosine": 4}
LAUNCHES |= {"qcsp with options": 4, "max_min": 5, "max_min, longer": 4, "mmr": 4}
MOST = 15  # calls of Python functions in a repeated call, those of Triton's launchers (here one a launch) not counted


def test_a_repeated_call_takes_few_calls_of_python():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", COUNT, "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: launches for name, (launches, *_) in found.items()} == LAUNCHES
    for name, (launches, plain, repeated, _, _) in found.items():
        assert repeated - launches <= MOST, (name, repeated)
        assert plain > 4 * repeated, (name, plain, repeated)


def times(launcher):
    """The launcher and how often it was called for itself."""
    calls = []

    def counted(*arguments, **named):
        calls.append(arguments)
        return launcher(*arguments, **named)

    return replay.replayed(counted), calls


@pytest.fixture
def replayed_on_cpu(monkeypatch):
    monkeypatch.setattr(replay, "DEVICES", {"cpu"})
    monkeypatch.setattr(replay.Record, "launch", lambda self, tensors: None)


def test_the_third_call_of_a_kind_is_replayed(replayed_on_cpu):
    call, calls = times(lambda x, n: torch.empty_like(x[:n]))
    for _ in range(5):
        assert call(torch.ones(4, 3), 2).shape == (2, 3)
    assert len(calls) == 2
    # Whatever a launch may depend on is another kind: sizes, strides, alignment, dtype, other values
    room = torch.ones(100)
    others = (torch.ones(5, 3), torch.ones(3, 4).T, room[1:13].view(4, 3), torch.ones(4, 3, dtype=torch.float16))
    for x in others:
        call(x, 2)
    call(torch.ones(4, 3), 3)
    assert len(calls) == 7


@pytest.mark.parametrize(
    "launcher",
    [
        lambda x: x.clone(),
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: torch.empty_like(x).fill_(1),
        lambda x: x,
        lambda x: x[:1],
        lambda x: torch.empty(8)[:4],
        lambda x: torch.empty(4, 4).T,
        lambda x: (lambda y: (y, y))(torch.empty(4)),
        lambda x: torch.empty_like(x).zero_(),
    ],
)
def test_what_a_record_cannot_hold_is_never_replayed(launcher, replayed_on_cpu):
    call, calls = times(launcher)
    for _ in range(4):
        call(torch.ones(4))
    assert len(calls) == 4


def test_profilers_are_told_of_every_launch(replayed_on_cpu):
    """They hook into Triton's run time, which a replayed call goes past."""
    call, calls = times(torch.empty_like)
    for _ in range(3):
        call(torch.ones(4))
    assert len(calls) == 2
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(torch.ones(4))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(calls) == 3
    call(torch.ones(4))
    assert len(calls) == 3


def test_kinds_that_are_remembered_are_bounded(replayed_on_cpu, monkeypatch):
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    call, calls = times(torch.empty_like)
    for _ in range(2):
        for n in range(9):
            assert call(torch.ones(n)).shape == (n,)
    assert len(calls) == 18
    for _ in range(3):
        call(torch.ones(4))
    assert len(calls) == 20
