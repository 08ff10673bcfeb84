"""script_kernels.numpy: the same bits as the PyTorch ops, clear errors, no PyTorch needed, GIL released."""

import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import ml_dtypes
import numpy as np
import pytest
import torch

import script_kernels
import script_kernels.numpy as script_numpy
from script_kernels import testing

DTYPES = (torch.float32, torch.float16)
ROOT = pathlib.Path(script_kernels.__file__).parents[1]


def same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "width"), [(1, 1, 1), (2, 63, 7), (3, 577, 40), (0, 5, 4)])
def test_every_function_gives_the_bits_of_its_op(batch: int, n: int, width: int, dtype: torch.dtype) -> None:
    tokens = testing.make_tokens("powerlaw", batch, n, width, dtype=dtype, seed=1)
    query = testing.make_tokens("gaussian", 1, 3, width, dtype=dtype, seed=2)
    mask = torch.tensor([[True, False, True]])
    k = (n + 2) // 3
    relevance = script_kernels.query_relevance(tokens, query, mask, negate=True)
    same(script_numpy.query_relevance(tokens.numpy(), query.numpy(), mask.numpy(), negate=True), relevance)
    for got, wanted in zip(
        script_numpy.gsp(tokens.numpy(), n - n // 2, rounds=2, gamma=0.5, min_degree=2, threshold=0.1),
        script_kernels.gsp(tokens, n - n // 2, rounds=2, gamma=0.5, min_degree=2, threshold=0.1),
        strict=True,
    ):
        same(got, wanted)
    for got, wanted in zip(
        script_numpy.bipartite_match(tokens.numpy(), 0.3), script_kernels.bipartite_match(tokens, 0.3), strict=True
    ):
        same(got, wanted)
    kernel = tokens.float() @ tokens.float().mT
    for view in (kernel, kernel.mT):
        for got, wanted in zip(script_numpy.dpp_map(view.numpy(), k), script_kernels.dpp_map(view, k), strict=True):
            same(got, wanted)
    ranking, gains = script_kernels.qcsp(tokens, relevance, k)
    for got, wanted in zip(script_numpy.qcsp(tokens.numpy(), relevance.numpy(), k), (ranking, gains), strict=True):
        same(got, wanted)
    kept = torch.arange(n).expand(batch, n) % 2 == 0
    same(
        script_numpy.mask_intersect(ranking.numpy(), kept.numpy(), (k + 1) // 2),
        script_kernels.mask_intersect(ranking, kept, (k + 1) // 2),
    )
    for options in (
        {},
        {"combine": "restrict", "gsp_drop": 0.5},
        {"query_mask": mask, "negate": True, "oversample": 1.5, "floor": 0.4},
    ):
        arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        same(
            script_numpy.prune(tokens.numpy(), query.numpy(), k, **arrays),
            script_kernels.prune(tokens, query, k, **options),
        )
    same(script_numpy.prune(tokens.numpy(), None, k), script_kernels.prune(tokens, None, k))
    aligned = testing.make_tokens("clustered", batch, n, width, dtype=dtype, seed=3)
    same(
        script_numpy.prune(tokens.numpy(), query.numpy(), k, aligned=aligned.numpy()),
        script_kernels.prune(tokens, query, k, aligned=aligned),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[], [1], [5, 0, 130, 64]])
def test_prune_varlen_gives_the_bits_of_its_op(lengths: list[int], dtype: torch.dtype) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    tokens = testing.make_tokens("powerlaw", 1, total, 9, dtype=dtype, seed=1)[0]
    aligned = testing.make_tokens("clustered", 1, total, 7, dtype=dtype, seed=2)[0]
    query = testing.make_tokens("gaussian", len(lengths), 3, 7, dtype=dtype, seed=3)
    keep = [(n + 2) // 3 for n in lengths]
    arrays = tokens.numpy(), starts.numpy()
    same(script_numpy.prune_varlen(*arrays, None, keep), script_kernels.prune_varlen(tokens, starts, None, keep))
    for options in ({}, {"combine": "restrict", "gsp_drop": 0.5, "negate": True}):
        same(
            script_numpy.prune_varlen(*arrays, query.numpy(), keep, aligned=aligned.numpy(), **options),
            script_kernels.prune_varlen(tokens, starts, query, keep, aligned=aligned, **options),
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_no_bit(batch: int) -> None:
    """Large enough that a single image is worth several threads, too."""
    tokens = testing.make_tokens("powerlaw", batch, 1500, 300, dtype=torch.float32, seed=1).numpy()
    relevance = np.linspace(0.1, 1, batch * 1500, dtype=np.float32).reshape(batch, 1500)
    starts = np.array([0, 1000, 1500], np.int32)
    calls = [
        lambda threads: script_numpy.query_relevance(tokens, tokens[:, :2], threads=threads),
        lambda threads: script_numpy.bipartite_match(tokens, threads=threads),
        lambda threads: script_numpy.gsp(tokens, 900, threads=threads),
        lambda threads: script_numpy.qcsp(tokens, relevance, 200, threads=threads),
        lambda threads: script_numpy.dpp_map(tokens[:, :300] @ tokens[:, :300].swapaxes(1, 2), 99, threads=threads),
        lambda threads: script_numpy.mask_intersect(
            np.arange(1500)[None].repeat(batch, 0), relevance > 0.5, 300, threads=threads
        ),
        lambda threads: script_numpy.prune(tokens, tokens[:, :2], 200, threads=threads),
        lambda threads: script_numpy.prune_varlen(tokens[0], starts, tokens[:1, :2], [200, 60], threads=threads),
    ]
    for call in calls:
        alone = call(1)
        for threads in (2, 5):
            for got, wanted in zip(call(threads), alone, strict=True):
                assert np.array_equal(got, wanted)


def test_more_threads_are_used() -> None:
    """A process of its own, which nothing else gives threads, has been on more than one while a call ran."""
    if not pathlib.Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    code = """
        import os, threading
        import numpy as np
        import script_kernels.numpy

        tokens = np.random.default_rng(0).standard_normal((2, 2048, 512)).astype(np.float32)

        def most(threads):
            seen, done = [0], threading.Event()

            def watch():
                while not done.is_set():
                    seen.append(len(os.listdir("/proc/self/task")))

            watcher = threading.Thread(target=watch)
            watcher.start()
            script_kernels.numpy.prune(tokens, None, 512, threads=threads)
            done.set()
            watcher.join()
            return max(seen)

        print(most(1), most(3))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    alone, shared = map(int, done.stdout.split())
    assert shared > alone


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    ranking = np.arange(8)[None].repeat(64, 0)
    ranking[60, 3] = 99
    with pytest.raises(ValueError, match=r"^ranking: expected distinct indices in \[0, N = 8\), got 99$"):
        script_numpy.mask_intersect(ranking, np.ones((64, 8), bool), 2, threads=4)


def test_bfloat16_by_ml_dtypes() -> None:
    tokens = testing.make_tokens("powerlaw", 2, 100, 33, dtype=torch.bfloat16, seed=1)
    array = tokens.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    same(script_numpy.prune(array, array[:, :2], 20), script_kernels.prune(tokens, tokens[:, :2], 20))


def test_strides_and_unaligned_fields() -> None:
    base = np.random.default_rng(0).standard_normal((2, 40, 12)).astype(np.float32)
    packed = np.zeros((2, 40, 12), dtype=[("flag", np.uint8), ("value", np.float32)])  # values at odd addresses
    packed["value"] = base
    wanted = script_numpy.prune(base, None, 9)
    for view in (
        np.asfortranarray(base),
        np.broadcast_to(base[:, None], (2, 3, 40, 12))[:, 1],
        np.ascontiguousarray(base[:, ::-1])[:, ::-1],
        packed["value"],
    ):
        assert np.array_equal(script_numpy.prune(view, None, 9), wanted)


X = np.zeros((2, 6, 4), np.float32)
STARTS = np.array([0, 3, 6], np.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: script_numpy.prune([1.0], None, 1), TypeError, "tokens: expected a numpy.ndarray, got list"),
        (
            lambda: script_numpy.prune(X.astype(np.float64), None, 1),
            TypeError,
            "tokens: expected float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: script_numpy.prune(X[0], None, 1),
            ValueError,
            "tokens: expected shape (B, N, D) with D >= 1, got (6, 4)",
        ),
        (lambda: script_numpy.prune(X, None, 7), ValueError, "keep: expected 1 <= keep <= N = 6, got 7"),
        (lambda: script_numpy.prune(X, None, 2.0), TypeError, "keep: expected an int, got float"),
        (
            lambda: script_numpy.prune(X, X[:, :, :3], 2),
            ValueError,
            "query: expected shape (2 or 1, Q >= 1, 4), got (2, 6, 3)",
        ),
        (
            lambda: script_numpy.prune(X, X, 2, query_mask=np.ones((1, 5), bool)),
            ValueError,
            "query_mask: expected shape (2 or 1, 6), got (1, 5)",
        ),
        (
            lambda: script_numpy.prune(X, X, 2, aligned=X[:1]),
            ValueError,
            "aligned: expected shape (2, 6, C) with C >= 1, got (1, 6, 4)",
        ),
        (
            lambda: script_numpy.prune(X, None, 2, gsp_drop=1.0),
            ValueError,
            "gsp_drop: expected 0 <= gsp_drop < 1, got 1.0",
        ),
        (
            lambda: script_numpy.prune(X, None, 2, floor=1.5),
            ValueError,
            "floor: expected 0 <= floor <= 1, got 1.5",
        ),
        (
            lambda: script_numpy.prune(X, None, 2, oversample=0.5),
            ValueError,
            "oversample: expected a finite number >= 1, got 0.5",
        ),
        (
            lambda: script_numpy.prune(X, None, 2, combine="both"),
            ValueError,
            "combine: expected 'intersect', 'restrict' or 'union', got 'both'",
        ),
        (
            lambda: script_numpy.prune(X, None, 2, gsp_drop=0.9),
            ValueError,
            "gsp_drop: 0.9 keeps 1, which of N = 6 tokens cannot be reached with rounds = 1 "
            "(a round drops at most half); needs rounds >= 2",
        ),
        (
            lambda: script_numpy.gsp(X, 1),
            ValueError,
            "keep: 1 of N = 6 tokens cannot be reached with rounds = 1 (a round drops at most half); needs rounds >= 2",
        ),
        (lambda: script_numpy.gsp(X, 4, rounds=0), ValueError, "rounds: expected rounds >= 1, got 0"),
        (lambda: script_numpy.gsp(X, 4, min_degree=-1), ValueError, "min_degree: expected min_degree >= 0, got -1"),
        (lambda: script_numpy.gsp(X, 4, gamma=np.inf), ValueError, "gamma: expected a finite number, got inf"),
        (
            lambda: script_numpy.qcsp(X, np.ones((2, 5), np.float32), 2),
            ValueError,
            "relevance: expected shape (2, 6), got (2, 5)",
        ),
        (lambda: script_numpy.qcsp(X, np.ones((2, 6)), 2), TypeError, "relevance: expected float32, got float64"),
        (lambda: script_numpy.gsp(X, 4, rounds=np.float64(1)), TypeError, "rounds: expected an int, got float64"),
        (lambda: script_numpy.gsp(X, 4, rounds=1000), ValueError, "rounds: expected rounds <= 100, got 1000"),
        (
            lambda: script_numpy.dpp_map(np.broadcast_to(np.float32(1), (1, 2**25, 2**25)), 1),
            ValueError,
            f"kernel: expected sizes up to {2**24}, got (1, {2**25}, {2**25})",
        ),
        (
            lambda: script_numpy.prune(np.ma.masked_array(X, X == 0), None, 2),
            TypeError,
            "tokens: expected a numpy.ndarray, got MaskedArray",
        ),
        (lambda: script_numpy.prune(X, None, 2, threads=0), ValueError, "threads: expected threads >= 1, got 0"),
        (lambda: script_numpy.gsp(X, 4, threads=1.0), TypeError, "threads: expected an int, got float"),
        (lambda: script_numpy.prune(X, None, 2, combine=3), TypeError, "combine: expected a str, got int"),
        (lambda: script_numpy.bipartite_match(X, np.nan), ValueError, "threshold: expected a finite number, got nan"),
        (lambda: script_numpy.dpp_map(X, 2), ValueError, "kernel: expected shape (B, N, N), got (2, 6, 4)"),
        (lambda: script_numpy.dpp_map(X[:, :4], 5), ValueError, "k: expected 1 <= k <= N = 4, got 5"),
        (
            lambda: script_numpy.prune_varlen(X, STARTS, None, [2, 1]),
            ValueError,
            "tokens: expected shape (T, D) with D >= 1, got (2, 6, 4)",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS.astype(np.int64), None, [2, 1]),
            TypeError,
            "cu_seqlens: expected int32, got int64",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS, None, np.array([2, 1])),
            TypeError,
            "keep: expected a sequence of ints, got ndarray",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS, None, [2]),
            ValueError,
            "keep: expected one count per segment, S = 2, got 1 counts",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS[::-1], None, [2, 1]),
            ValueError,
            "cu_seqlens: expected a start at 0, got 6",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS, None, [2, 4]),
            ValueError,
            "keep[1]: expected 1 <= keep[1] <= 3, the segment's length, got 4",
        ),
        (
            lambda: script_numpy.prune_varlen(X[0], STARTS, X[:, :, :3], [2, 1]),
            ValueError,
            "query: expected shape (2 or 1, Q >= 1, 4), got (2, 6, 3)",
        ),
        (
            lambda: script_numpy.mask_intersect(np.array([[0, 0]]), np.ones((1, 3), bool), 1),
            ValueError,
            "ranking: expected distinct indices in [0, N = 3), got 0 twice",
        ),
        (
            lambda: script_numpy.mask_intersect(np.array([[0, 3]]), np.ones((1, 3), bool), 1),
            ValueError,
            "ranking: expected distinct indices in [0, N = 3), got 3",
        ),
        (
            lambda: script_numpy.mask_intersect(np.array([[0, 1]]), np.ones((2, 3), bool), 1),
            ValueError,
            "mask: expected shape (1, N), got (2, 3)",
        ),
    ],
)
def test_errors(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_without_pytorch() -> None:
    """A fresh process in which torch cannot be imported prunes, and says what the other functions need."""
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
import numpy, script_kernels.numpy
tokens = numpy.random.default_rng(0).standard_normal((1, 50, 8)).astype(numpy.float32)
print(script_kernels.numpy.prune(tokens, tokens[:, :2], 5).shape, "torch" in sys.modules)
try:
    script_kernels.prune
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "(1, 5) False"
    assert second.startswith("script_kernels.prune needs PyTorch, which is not installed")


def test_the_gil_is_released() -> None:
    """While one thread prunes for a while, another one counts; holding the GIL, it would not get to count at all."""
    tokens = np.random.default_rng(0).standard_normal((1, 4096, 512)).astype(np.float32)
    done = threading.Event()

    def work() -> None:
        script_numpy.prune(tokens, None, 512)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    assert ticks > 3


ENDING = """
import threading, time
import numpy as np
import script_kernels.numpy as sn
tokens = np.random.default_rng(0).standard_normal((1, 1500, 64), dtype=np.float32)
expected = sn.prune(tokens, None, 300)
def work():
    while True:
        sn.prune(tokens, None, 300)
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""


def test_a_daemon_thread_in_a_call_does_not_abort_the_end_of_the_interpreter() -> None:
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


FORKING = """
import os
import numpy as np
import script_kernels.numpy as sn
tokens = np.random.default_rng(0).standard_normal((4, 1500, 64), dtype=np.float32)
expected = sn.prune(tokens, None, 100)
child = os.fork()
same = (sn.prune(tokens, None, 100) == expected).all()
if child == 0:
    os._exit(0 if same else 3)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_fork_between_calls_leaves_both_processes_able_to_call() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
