"""python -m script_kernels.targets: every kernel of every launch table compiles for every target and fits.

Other tests of the process may have turned Triton's interpreter on, so whatever compiles runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from script_kernels import targets

pytest.importorskip("triton")
from triton._C.libtriton import native_specialize_impl
from triton.compiler import make_backend

ROOT = Path(targets.__file__).parents[1]


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_every_kernel_compiles_for_every_target():
    done = run("-m", "script_kernels.targets")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    *lines, total = done.stdout.splitlines()[1:]
    assert total == f"{len(lines)} binaries, 0 with problems"
    rows = [line.rsplit(maxsplit=6) for line in lines]
    kernels = {kernel for _, kernel, *_ in rows}
    for kernel in kernels:
        assert {target for _, k, target, *_ in rows if k == kernel} == set(targets.TARGETS), kernel
    for _, _, _, registers, spilled, shared, size in rows:
        assert 0 <= int(registers) <= 512
        assert int(spilled) == 0
        assert 0 <= int(shared) <= max(targets.SHARED_LIMITS.values())
        assert int(size) > 0
    assert max(int(row[3]) for row in rows) > 32


def test_no_kernel_is_missing_from_the_launch_tables():
    script = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
from script_kernels import targets
from script_kernels.triton import kernels as package
compiled = {launch.kernel.__name__ for launch in targets.collect()}
written = {
    name
    for info in pkgutil.iter_modules(package.__path__)
    for name, value in vars(importlib.import_module(f"{package.__name__}.{info.name}")).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
assert written, "no kernel found"
assert compiled == written, compiled ^ written
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_prune_takes_six_launches():
    """Up to 1024 tokens, on a GPU of 132 processors; packed segments take one more, which places `keep`."""
    script = """
from types import SimpleNamespace
import torch
from script_kernels import targets
from script_kernels.options import PruneOptions
from script_kernels.triton.kernels import plan
from script_kernels.triton.prune import launch_prune
from script_kernels.triton.prune_varlen import launch_prune_varlen

torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
plan_greedy = plan.plan_greedy
plan.plan_greedy = lambda device, *sizes, **options: plan_greedy(torch.device("cuda"), *sizes, **options)


def count(call):
    with targets.recording("prune") as take:
        call()
        return len(take(""))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


query, aligned = empty(1, 20, 768), empty(32, 576, 768)
print(count(lambda: launch_prune(empty(1, 576, 4096), empty(1, 20, 4096), 64, PruneOptions())))
print(count(lambda: launch_prune(empty(8, 1024, 1024), empty(8, 20, 1024), 128, PruneOptions())))
print(count(lambda: launch_prune(empty(32, 576, 1024), query, 64, PruneOptions(combine="restrict"), aligned=aligned)))
print(count(lambda: launch_prune(empty(1, 576, 4096), None, 64, PruneOptions())))
bounds = empty(6, dtype=torch.int32)
print(count(lambda: launch_prune_varlen(empty(2880, 4096), bounds, empty(5, 20, 4096), [32] * 5, PruneOptions())))
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "6", "6", "5", "7"]


BAD_KERNELS = """
import torch
import triton
import triton.language as tl
from script_kernels import targets


@triton.jit
def spilling_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b_y = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(100):
        b_y += tl.load(p_y + i * BLOCK + o) * b_x
    tl.store(p_y + o, b_y + tl.sum(b_y, axis=0) * b_x)


@triton.jit
def wide_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_xy = o[:, None] * BLOCK + o[None, :]
    b_acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i in range(8):
        b_x = tl.load(p_x + i * BLOCK * BLOCK + o_xy)
        b_acc = tl.dot(b_x, tl.trans(b_x), acc=b_acc)
    tl.store(p_y + o_xy, b_acc)


@triton.jit
def broken_kernel(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_x + tl.arange(0, BLOCK), tl.load(p_y + tl.arange(0, 2 * BLOCK)))


x = torch.empty(4096, dtype=torch.float32, device="meta")
half = torch.empty(4096, dtype=torch.float16, device="meta")
for call, name in (
    (lambda: spilling_kernel[(1,)](x, x, BLOCK=8192, num_warps=4, maxnreg=32), "sm_80"),
    (lambda: wide_kernel[(1,)](half, x, BLOCK=256, num_warps=16, num_stages=3), "sm_86"),
    (lambda: broken_kernel[(1,)](x, x, BLOCK=64), "sm_90"),
):
    with targets.recording("bad") as take:
        call()
        (launch,) = take("only")
    print(*targets.compile_launch(launch, name).problems)
"""


def test_problems_are_found(tmp_path):
    """Negative controls: a kernel that spills, one that wants too much shared memory, one that does not compile."""
    path = tmp_path / "bad_kernels.py"
    path.write_text(BAD_KERNELS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    spilling, wide, broken = done.stdout.splitlines()
    assert spilling.startswith("spills ")
    assert "shared memory of 101376" in wide
    assert broken.startswith("does not compile: ")


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        targets.main([])
    assert stopped.value.code != 0
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_arguments_are_specialised_as_at_run_time():
    """Against what the runtime itself derives."""
    backend = make_backend(targets.gpu_target("sm_90"))
    given = {
        "p_x": torch.empty(8, dtype=torch.bfloat16),
        "none": None,
        "one": 1,
        "aligned": 64,
        "odd": 2**40 + 1,
        "free": 32,
        "free_one": 1,
        "scale": 1.0,
        "strides": (1, 48, 7, torch.empty(4), None),
        "free_strides": (1, 48),
    }
    parameters = [
        SimpleNamespace(name=name, is_constexpr=False, do_not_specialize=name.startswith("free")) for name in given
    ]
    parameters.append(SimpleNamespace(name="BLOCK", is_constexpr=True, do_not_specialize=False))
    kernel = SimpleNamespace(params=parameters)
    signature, constants, attributes = targets.describe(kernel, {**given, "BLOCK": 16})
    for i, (name, value) in enumerate(given.items()):
        kind, hint = native_specialize_impl(backend, value, False, not name.startswith("free"), True)
        assert signature[name] == kind, name
        hints = (
            dict(zip([(i, j) for j in range(len(hint))], hint, strict=True))
            if isinstance(value, tuple)
            else {(i,): hint}
        )
        for path, expected in hints.items():
            assert (path in attributes) == (expected == "D"), path
    assert signature["BLOCK"] == "constexpr"
    assert constants == {(1,): None, (2,): 1, (8, 0): 1, (8, 4): None, (9, 0): 1, (10,): 16}


def test_every_launch_fixes_the_fusion_of_products_and_sums():
    """Its default changes with Triton's version, and with it bits; `launch` is the one place that launches."""
    script = """
from script_kernels import targets
print({launch.options["enable_fp_fusion"] for launch in targets.collect()})
"""
    done = run("-c", script)
    assert done.stdout == "{True}\n", done.stderr
    folder = ROOT / "script_kernels" / "triton"
    launched = [p.name for p in folder.rglob("*.py") if re.search(r"\w+\[\(", p.read_text())]
    assert launched == ["layout.py"]


def test_unreadable_metadata_is_an_error():
    with pytest.raises(ValueError, match="vgpr_count"):
        targets.amd_usage("")
