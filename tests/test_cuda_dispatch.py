"""The CUDA side of the ops as far as a machine without a GPU shows it: dispatch, launcher arguments, fakes, binding."""

import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import script_kernels
from script_kernels import ops

ROOT = pathlib.Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
TORCH = pathlib.Path(torch.__file__).parent

NAMES = [op.name for op in ops.OPS]
TRITON_OPS = [name for name in NAMES if name != "mask_intersect"]  # in the schemas' order


def run_python(code: str) -> str:
    """What a fresh interpreter prints: registrations live as long as their process."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"script::{name}", "CUDA")


def test_triton_launchers_get_every_argument_of_the_schema() -> None:
    """CPU tensors, sent to the CUDA key by hand; each launcher is replaced by one that records what it gets: the first
    arguments in the schema's order, options as one value, the rest by name."""
    printed = run_python("""
        import dataclasses, sys, types, torch
        import script_kernels

        class Launched(Exception):
            pass

        x = torch.ones(2, 8, 4)
        given = {
            "query_relevance": ((x, x), {}),
            "bipartite_match": ((x,), {}),
            "gsp": ((x, 6), {"rounds": 2}),
            "dpp_map": ((torch.ones(2, 8, 8), 3), {}),
            "qcsp": ((x, torch.ones(2, 8), 3), {"power": 2.0}),
            "max_min": ((x, None, 3), {}),
            "mmr": ((x, torch.ones(2, 8), 3), {"balance": 0.25}),
            "prune": ((x, None, 3), {"oversample": 1.5}),
            "prune_varlen": ((x[0], torch.tensor([0, 8], dtype=torch.int32), None, [3]), {"combine": "restrict"}),
        }
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        for name, (positional, options) in given.items():
            calls = []

            names = [argument.name for argument in getattr(torch.ops.script, name).default._schema.arguments]

            def launch(*arguments, **named):
                values = [x for x in arguments if not dataclasses.is_dataclass(x)]
                for value in arguments[len(values):]:
                    named.update(dataclasses.asdict(value))
                calls.append(dict(zip(names, values)) | named)
                raise Launched

            module = types.ModuleType(f"script_kernels.triton.{name}")
            setattr(module, f"launch_{name}", launch)
            sys.modules[module.__name__] = module
            op = getattr(torch.ops.script, name).default
            for _ in range(2):
                try:
                    op.redispatch(cuda, *positional, **options)
                except Launched:
                    pass
            expected = {argument.name: argument.default_value for argument in op._schema.arguments}
            expected |= dict(zip(names, positional)) | options
            assert len(calls) == 2, name
            for got in calls:
                assert got.keys() == expected.keys(), (name, got, expected)
                for key in got:
                    one, other = got[key], expected[key]
                    same = torch.equal(one, other) if torch.is_tensor(one) else one == other
                    assert same, (name, key, one, other)
            print(name)
    """)
    assert printed.split() == TRITON_OPS


@pytest.mark.skipif(ops.CUDA_LIBRARY.loaded, reason="the CUDA library is loaded")
def test_without_the_cuda_library_mask_intersect_says_why() -> None:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    arguments = (torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), 2)
    with pytest.raises(RuntimeError, match=r"_C_cuda is not loaded: .*pip install"):
        torch.ops.script.mask_intersect.default.redispatch(cuda, *arguments)


# Fakes on fake CUDA tensors.


def fake(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda:1") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def test_fakes_stay_on_the_device_of_their_inputs() -> None:
    with FakeTensorMode():
        x = fake(3, 40, 16, dtype=torch.bfloat16)
        packed, ends = fake(40, 16, dtype=torch.bfloat16), fake(3, dtype=torch.int32)
        outputs = {
            "query_relevance": script_kernels.query_relevance(x, fake(1, 4, 16, dtype=torch.bfloat16)),
            "bipartite_match": script_kernels.bipartite_match(x),
            "gsp": script_kernels.gsp(x, 30),
            "dpp_map": script_kernels.dpp_map(fake(3, 40, 40), 7),
            "qcsp": script_kernels.qcsp(x, fake(3, 40), 7),
            "max_min": script_kernels.max_min(x, None, 7),
            "mmr": script_kernels.mmr(x, fake(3, 40), 7),
            "mask_intersect": script_kernels.mask_intersect(
                fake(3, 20, dtype=torch.int64), fake(3, 40, dtype=torch.bool), 7
            ),
            "prune": script_kernels.prune(x, None, 7),
            "prune_varlen": script_kernels.prune_varlen(packed, ends, None, [5, 6]),
        }
    assert set(outputs) == set(NAMES)
    shapes = {}
    for name, output in outputs.items():
        parts = output if isinstance(output, tuple) else (output,)
        assert all(part.device == torch.device("cuda:1") for part in parts), name
        shapes[name] = [(tuple(part.shape), part.dtype) for part in parts]
    picks = [((3, 7), torch.int64), ((3, 7), torch.float32)]
    assert shapes["dpp_map"] == shapes["qcsp"] == shapes["max_min"] == shapes["mmr"] == picks
    assert shapes["mask_intersect"] == shapes["prune"] == picks[:1]
    assert shapes["prune_varlen"] == [((11,), torch.int64)]
    assert shapes["query_relevance"] == [((3, 40), torch.float32)]
    assert shapes["gsp"] == [((3, 40), torch.bool), ((3, 40), torch.float32)]
    matches = [torch.float32, torch.int32, torch.int32, torch.float32, torch.float32]
    assert shapes["bipartite_match"] == [((3, 20), dtype) for dtype in matches]


@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:0"])
def test_inputs_on_two_devices_are_refused(elsewhere: str) -> None:
    with FakeTensorMode():
        x = fake(2, 40, 16)
        calls = {
            "query": lambda: script_kernels.prune(x, fake(1, 4, 16, device=elsewhere), 7),
            "aligned": lambda: script_kernels.prune(x, fake(1, 4, 8), 7, aligned=fake(2, 40, 8, device=elsewhere)),
            "relevance": lambda: script_kernels.qcsp(x, fake(2, 40, device=elsewhere), 7),
            "cu_seqlens": lambda: script_kernels.prune_varlen(
                fake(40, 16), fake(2, dtype=torch.int32, device=elsewhere), None, [7]
            ),
            "mask": lambda: script_kernels.mask_intersect(
                fake(2, 20, dtype=torch.int64), fake(2, 40, dtype=torch.bool, device=elsewhere), 7
            ),
        }
        for argument, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{argument}: expected the device of \w+, cuda:1, got {elsewhere}"):
                call()


# The C++ binding, over the emulated kernel and a stand-in for torch's CUDA half.


@pytest.fixture(scope="module")
def binding(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """mask_intersect.cu as a library that a CPU torch can load."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulation is built with g++ on Linux")
    library = tmp_path_factory.mktemp("binding") / "binding.so"
    source = ROOT / "csrc" / "cuda" / "mask_intersect.cu"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-I", EMULATION, "-I", ROOT / "csrc"]
    command += ["-isystem", TORCH / "include", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-x", "c++", source, EMULATION / "emulation.cpp", EMULATION / "shims.cpp"]
    command += ["-x", "none", TORCH / "lib" / "libtorch_cpu.so", "-o", library]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def test_the_binding_checks_guards_and_launches(binding: pathlib.Path) -> None:
    printed = run_python(f"""
        import ctypes, torch
        library = torch.library.Library("script", "DEF")
        library.define("mask_intersect(Tensor ranking, Tensor mask, int k) -> Tensor")
        torch.ops.load_library({str(binding)!r})
        shims = ctypes.CDLL({str(binding)!r})
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def op(*arguments):
            return torch.ops.script.mask_intersect.default.redispatch(cuda, *arguments)

        def record():
            out = (ctypes.c_int32 * 4)()
            shims.emulated_record(out)
            return list(out)

        ranking = torch.stack([torch.randperm(90)[:50] for _ in range(6)])[::2, 1::2]
        mask = (torch.rand(90, 3) < 0.4).T
        found = op(ranking, mask, 11)
        for row, kept, got in zip(ranking.tolist(), mask.tolist(), found.tolist()):
            inside = [i for i in row if kept[i]]
            assert got == sorted((inside + [i for i in row if not kept[i]])[:11]), got
        assert found.shape == (3, 11) and found.dtype == torch.int64 and found.is_contiguous()
        device = ranking.get_device()
        assert record() == [1, 0, device, device], record()
        assert op(ranking[:0], mask[:0], 11).shape == (0, 11)
        assert record() == [2, 0, device, device], record()

        wrong = {{
            "k: expected 1 <= k <= P = 25, got 26": (ranking, mask, 26),
            "k: expected 1 <= k <= P = 25, got 0": (ranking, mask, 0),
            "ranking: expected int64, got int32": (ranking.int(), mask, 1),
            "mask: expected bool, got uint8": (ranking, mask.byte(), 1),
            "ranking: expected P <= N = 20, got P = 25": (ranking, mask[:, :20], 1),
        }}
        for message, arguments in wrong.items():
            try:
                op(*arguments)
            except RuntimeError as error:
                assert message in str(error), error
            else:
                raise AssertionError(message)
        assert record()[:2] == [2, 0], "a refused call touched the device"
        print("passed")
    """)
    assert printed == "passed\n"
