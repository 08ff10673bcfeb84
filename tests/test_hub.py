"""The projects that tools/hub.py lays out for kernel-builder: what stands in them, and that their Python runs in a
namespace of its own. kernel-builder itself needs Nix and does not run here."""

import importlib.util
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import script_kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPS = """
import torch
ops = torch.ops._script_kernels_test
def add_op_namespace_prefix(name): return f"_script_kernels_test::{name}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("hub") / "out"
    subprocess.run([sys.executable, ROOT / "tools" / "hub.py", path], check=True, capture_output=True)
    return path


def test_every_source_that_is_named_is_there(folder: pathlib.Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")
    build = tomllib.loads((folder / "script-kernels" / "build.toml").read_text())
    assert build["general"]["edition"] == 5
    assert build["torch"]["stable-abi"] == {"cpu": "2.10", "cuda": "2.10"}
    named = [source for part in (build["torch"], *build["kernel"].values()) for source in part["src"]]
    project = folder / "script-kernels"
    assert all((project / source).is_file() for source in named)
    compiled = {str(path.relative_to(project)) for path in project.rglob("*.c*") if path.suffix in (".cpp", ".cu")}
    assert sorted(compiled) == sorted(source for source in named if source.endswith((".cpp", ".cu")))  # each once
    for path in project.rglob("*.c*"):
        assert "LIBRARY_IMPL(script," not in path.read_text(), path


def test_the_universal_project_compiles_nothing(folder: pathlib.Path) -> None:
    project = folder / "script-kernels-triton"
    assert (project / "build.toml").read_text().endswith("[torch-noarch]\n")
    assert {path.suffix for path in project.rglob("*") if path.is_file()} == {".toml", ".py"}


def imported(package: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_kernel", package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_kernel"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs_beside_the_package(folder: pathlib.Path) -> None:
    package = folder / "script-kernels-triton" / "torch-ext" / "script_kernels_triton"
    for path in package.rglob("*.py"):  # nothing reaches for an installed script_kernels
        assert "from script_kernels" not in path.read_text(), path
    (package / "_ops.py").write_text(OPS)
    module = imported(package)
    assert set(module.__all__) == set(script_kernels.__all__)
    assert module.prune(torch.empty(2, 40, 8, device="meta"), None, 5).shape == (2, 5)
    assert script_kernels.prune(torch.randn(2, 40, 8), None, 5).shape == (2, 5)
    with pytest.raises(ValueError, match="keep: expected 1 <= keep <= N = 40, got 41"):
        module.prune(torch.randn(2, 40, 8), None, 41)
    with pytest.raises(RuntimeError, match="this build has no CPU op of this name"):
        module.prune(torch.randn(2, 40, 8), None, 5)
    # Its Triton pages import: relatively, down to the kernels.
    assert callable(importlib.import_module("hub_kernel.triton.prune").launch_prune)


def test_the_library_keeps_to_the_stable_abi_of_python() -> None:
    check = pytest.importorskip("kernel_abi_check", reason="the checker of Hugging Face's kernels")
    library = check.ObjectFile(str(ROOT / "script_kernels" / "_C_cpu.so"))
    assert library.check_python_abi("3.10") == []
