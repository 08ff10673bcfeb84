"""Imports in fresh processes: without Triton, without a library, without a GPU, without PyTorch."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import textwrap

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "script_kernels"


def run(code: str, *, root: pathlib.Path = PACKAGE.parent, flags: tuple[str, ...] = (), **environment: str) -> str:
    """Runs code in a new interpreter that imports script_kernels from `root`; returns what it prints."""
    # The finder of an editable install would lend the modules that are missing in `root`.
    start = f"""
        import sys
        sys.path.insert(0, {str(root)!r})
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_without(tmp_path: pathlib.Path, *libraries: str) -> pathlib.Path:
    """The package in another place, with some of its libraries missing."""
    missing = shutil.ignore_patterns(*(f"{library}*.so" for library in libraries), "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "script_kernels", ignore=missing)
    return tmp_path


PRUNE = """
    import torch, script_kernels
    tokens = torch.randn(1, 20, 8)
    assert script_kernels.prune(tokens, None, 5).shape == (1, 5)
    assert torch.ops.script.prune(tokens, None, 5).shape == (1, 5)
"""


def test_import_loads_neither_triton_nor_the_extras() -> None:
    code = """
        import torch
        before = set(sys.modules)
        import script_kernels
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    loaded = set(run(code).split()) - set(sys.stdlib_module_names)
    assert loaded == {"script_kernels"}


BLOCK_TRITON = """
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
    sys.meta_path.insert(0, Block())
"""


def test_without_triton() -> None:
    run(textwrap.dedent(BLOCK_TRITON) + textwrap.dedent(PRUNE))


def test_without_triton_a_cuda_call_says_so() -> None:
    code = """
        from script_kernels import ops
        try:
            (gsp,) = (op for op in ops.OPS if op.name == "gsp")
            ops._on_cuda(gsp)(torch.randn(1, 8, 4), 6)
        except ImportError as error:
            print(error)
    """
    text = run(textwrap.dedent(BLOCK_TRITON) + "import torch, script_kernels\n" + textwrap.dedent(code))
    assert text == "script.gsp on CUDA needs Triton, which is not installed: pip install triton\n"


def test_without_a_gpu() -> None:
    run(PRUNE, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("library", [None, b"not a library"], ids=["missing", "broken"])
def test_without_the_cpu_library(tmp_path: pathlib.Path, library: bytes | None) -> None:
    """The import and the fakes work; a call says what is missing, why, and how to build it."""
    root = copy_without(tmp_path, "_C_cpu", "_C_cuda", "_core")
    if library is not None:
        (root / "script_kernels" / "_C_cpu.so").write_bytes(library)
    code = """
        import torch, script_kernels
        from script_kernels import info
        tokens = torch.randn(1, 20, 8)
        assert script_kernels.prune(tokens.to("meta"), None, 5).shape == (1, 5)
        ranking, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        for call in (
            lambda: script_kernels.prune(tokens, None, 5),
            lambda: torch.ops.script.gsp(tokens, 15),
            lambda: script_kernels.mask_intersect(ranking, mask, 1),
        ):
            try:
                call()
            except RuntimeError as error:
                print(error)
        facts = info.collect()
        assert "not loaded" in facts["CPU ops"], facts
        assert "not loaded" in facts["C++ module"], facts
    """
    lines = run(code, root=root).splitlines()
    assert len(lines) == 3
    reason = "does not exist" if library is None else "does not load with torch"
    for line in lines:
        assert line.startswith("script_kernels: the library _C_cpu is not loaded: ")
        assert reason in line
        assert line.endswith("run in the source tree: pip install --no-build-isolation -e .")


def test_without_torch() -> None:
    """-S leaves site-packages out; what an environment with NumPy alone would hold is not needed to import."""
    code = """
        import importlib.util
        assert importlib.util.find_spec("torch") is None
        import script_kernels
        from script_kernels import __version__, info, library
        assert __version__ == script_kernels.__version__
        assert info.collect()["PyTorch"] == "not installed"
        for statement in ("script_kernels.prune", "from script_kernels import qcsp"):
            try:
                exec(statement)
            except ImportError as error:
                print(error)
        assert not hasattr(script_kernels, "no_such_name")
        try:
            script_kernels.no_such_name
        except AttributeError as error:
            print(error)
    """
    lines = run(code, flags=("-S",)).splitlines()
    hint = "needs PyTorch, which is not installed: pip install 'torch>=2.10'."
    assert lines[0].startswith(f"script_kernels.prune {hint}")
    assert lines[1].startswith(f"script_kernels.qcsp {hint}")
    assert lines[2] == "module 'script_kernels' has no attribute 'no_such_name'"


def test_core_module_imports_without_torch() -> None:
    code = """
        from script_kernels import _core
        print(sorted(_core.build_info()))
        assert "torch" not in sys.modules
    """
    assert run(code, flags=("-S",)) == "['compiler', 'cuda_archs', 'simd', 'torch']\n"


def test_simd_level_can_be_lowered_and_only_that() -> None:
    code = "from script_kernels import _core; print(_core.build_info()['simd'])"
    levels = ["baseline", "avx2", "avx512", "avx512_bf16"]
    best = run(code, flags=("-S",)).strip()
    for level in levels:
        got = run(code, flags=("-S",), SCRIPT_KERNELS_SIMD=level).strip()
        assert levels.index(got) == min(levels.index(level), levels.index(best))


def test_command_line_is_installed() -> None:
    command = pathlib.Path(sysconfig.get_path("scripts")) / "script-kernels"
    result = subprocess.run([command, "info"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "CPU ops" in result.stdout
