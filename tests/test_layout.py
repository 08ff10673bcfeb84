"""The layout's rules: who may import whom, which headers stay free of torch, how long a file may be."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "script_kernels"
CSRC = ROOT / "csrc"
MAX_LINES = 500

# Which of our own modules each may import, besides its own package; a module that is not named follows INTEGRATION.
# "!" marks the imports that must stay inside functions, so that importing the package does not need them.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "version"},
    "api": {"ops", "checks"},
    "ops": {"checks", "library", "triton!"},
    "checks": {"schedule"},
    "schedule": set(),
    "library": set(),
    "reference": set(),
    "testing": {"reference"},
    "triton": {"checks", "schedule"},
    "numpy": {"_core", "schedule"},
}
# Demo, command line and integrations: users of the public functions, and of the oracle to compare with.
INTEGRATION = {"", "numpy", "library", "_core!", "demo!", "info!", "reference!", "transformers!", "triton!"}
# What importing these modules may load besides the standard library; other packages are imported where they are used.
LOADS = {
    "__init__": set(),
    "api": {"torch"},
    "ops": {"torch"},
    "checks": {"torch"},
    "schedule": set(),
    "library": set(),
    "reference": {"torch"},
    "numpy": {"numpy"},
}

TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def module_name(path: pathlib.Path) -> str:
    """The first component below the package: `triton/gsp.py` belongs to `triton`."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(source: str, package: str = "script_kernels") -> list[tuple[str, bool]]:
    """(absolute dotted name, whether it runs at import time) of every import in a file of `package`."""
    tree = ast.parse(source)
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            # `if TYPE_CHECKING:` never runs.
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    base = ".".join(parts[: len(parts) - child.level + 1] + ([base] if base else []))
                # `from package import module` names a module; `from module import name` does not.
                if base in ("script_kernels", "script_kernels.triton"):
                    found.extend((f"{base}.{alias.name}", at_import) for alias in child.names)
                else:
                    found.append((base, at_import))
            visit(child, at_import and not deferred)

    visit(tree, True)
    return found


def direction_faults(module: str, source: str, package: str = "script_kernels") -> list[str]:
    """Imports of `module` that the directions do not allow."""
    allowed = ALLOWED.get(module, INTEGRATION) | {module}
    faults = []
    for name, at_import in imports_of(source, package):
        if not (name == "script_kernels" or name.startswith("script_kernels.")):
            continue
        target = [*name.split("."), ""][1]
        is_module = target == "" or target.startswith("_C") or target == "_core" or target in MODULES
        if not is_module:  # a public name re-exported by the package, as in `from script_kernels import prune`
            target = ""
        if target in allowed or (f"{target}!" in allowed and not at_import):
            continue
        faults.append(f"{module} imports {name}{' at import time' if at_import else ''}")
    return faults


MODULES = {module_name(path) for path in PACKAGE.rglob("*.py")}
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_directions(path: pathlib.Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert direction_faults(module_name(path), path.read_text(), package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference", "from script_kernels import api"),
        ("reference", "from . import ops"),
        ("ops", "from script_kernels.api import prune"),
        ("ops", "from script_kernels.triton.gsp import launch_gsp"),
        ("api", "import script_kernels.triton.gsp"),
        ("api", "def f():\n    from script_kernels.testing import certify"),
        ("demo", "from script_kernels.testing import make_tokens"),
        ("checks", "from script_kernels import reference"),
    ],
)
def test_a_wrong_direction_is_seen(module: str, source: str) -> None:
    assert len(direction_faults(module, source)) == 1


@pytest.mark.parametrize("module", sorted(LOADS))
def test_importing_the_core_loads_no_optional_package(module: str) -> None:
    for name, at_import in imports_of((PACKAGE / f"{module}.py").read_text()):
        top = name.split(".")[0]
        assert not at_import or top in LOADS[module] | {"script_kernels"} | sys.stdlib_module_names, name


def includes_of(path: pathlib.Path) -> list[tuple[bool, str]]:
    """(quoted, name) of each include."""
    return [(mark == '"', name) for mark, name in INCLUDE.findall(path.read_text())]


def torch_chain(path: pathlib.Path, root: pathlib.Path, seen: frozenset[pathlib.Path] = frozenset()) -> list[str]:
    """The chain of includes by which `path` reaches a header of torch, Python or pybind11; empty if none does."""
    for quoted, name in includes_of(path):
        if TORCH_HEADER.match(name):
            return [path.name, name]
        for folder in (path.parent, root) if quoted else (root,):
            header = (folder / name).resolve()
            if header.is_file() and header not in seen:
                chain = torch_chain(header, root, seen | {header})
                if chain:
                    return [path.name, *chain]
    return []


CORES = sorted([*CSRC.glob("cpu/*.hpp"), *CSRC.glob("cuda/*.cuh")])


@pytest.mark.parametrize("path", CORES, ids=lambda path: str(path.relative_to(CSRC)))
def test_cores_reach_no_torch_header(path: pathlib.Path) -> None:
    assert torch_chain(path, CSRC) == []


def test_a_torch_header_is_seen_through_another(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "checks.h").write_text("#include <torch/csrc/stable/tensor.h>\n")
    (tmp_path / "cpu" / "gsp.hpp").write_text('#include <vector>\n#include "common/checks.h"\n')
    chain = torch_chain(tmp_path / "cpu" / "gsp.hpp", tmp_path)
    assert chain == ["gsp.hpp", "checks.h", "torch/csrc/stable/tensor.h"]


def source_files() -> list[pathlib.Path]:
    files = [ROOT / "setup.py"]
    for folder in ("script_kernels", "tests", "bench", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".hpp", ".h", ".cu", ".cuh"} and "out" not in path.parts:
                files.append(path)
    return files


def test_no_file_outgrows_a_reader() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in source_files()}
    assert len(lengths) > 10
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def op_names() -> list[str]:
    """The ops that ops.py defines, read from its schemas without importing it."""
    source = (PACKAGE / "ops.py").read_text()
    return sorted(set(re.findall(r"\b([a-z_]+)\(Tensor ", source)))


def functions_of(module: str) -> set[str]:
    body = ast.parse((PACKAGE / f"{module}.py").read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_each_op_is_found_by_its_name() -> None:
    names = op_names()
    assert len(names) == 8
    api, oracle = functions_of("api"), functions_of("reference")
    for name in names:
        assert name in api, f"api.py has no {name}"
        assert name in oracle, f"reference.py has no {name}"
        assert (CSRC / "cpu" / f"{name}.cpp").exists(), f"csrc/cpu/{name}.cpp is missing"
