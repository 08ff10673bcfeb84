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
    "api": {"ops", "checks", "options"},
    "ops": {"checks", "library", "options", "triton!"},
    "checks": {"options"},
    "options": set(),
    "library": set(),
    "reference": set(),
    "testing": {"reference", "options"},
    "triton": {"options"},
    "arrays": {"options"},
    "numpy": {"_core", "arrays", "options", "array_methods!"},
    "array_methods": {"array_focus", "arrays", "numpy", "options"},
    "array_focus": {"arrays", "numpy", "options"},
    "methods": {"", "checks", "options", "reference!"},
    "calibrate": {"options"},
    "selection": {"page!"},
    "page": {"selection"},
}
# Demo, command line and integrations: users of the public functions, and of the oracle to compare with.
INTEGRATION = {"", "numpy", "library", "options", "methods", "calibrate", "selection"}
INTEGRATION |= {"_core!", "demo!", "info!", "reference!", "transformers!", "triton!"}
# What importing these modules may load besides the standard library; other packages are imported where they are used.
LOADS = {
    "__init__": set(),
    "api": {"torch"},
    "ops": {"torch"},
    "checks": {"torch"},
    "options": set(),
    "library": set(),
    "reference": {"torch"},
    "arrays": {"numpy"},
    "numpy": {"numpy"},
    "array_methods": {"numpy"},
    "array_focus": {"numpy"},
    "selection": {"numpy"},
    "page": {"numpy"},
}
# An op's Triton page says what is launched; kernels and plans live below it, and the launch tables beside it.
MAX_PAGE = 90

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


CORES = sorted([*CSRC.glob("core/*.hpp"), *CSRC.glob("simd/*.hpp"), *CSRC.glob("cuda/*.cuh")])


@pytest.mark.parametrize("path", CORES, ids=lambda path: str(path.relative_to(CSRC)))
def test_cores_reach_no_torch_header(path: pathlib.Path) -> None:
    assert torch_chain(path, CSRC) == []


def test_a_torch_header_is_seen_through_another(tmp_path: pathlib.Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "checks.h").write_text("#include <torch/csrc/stable/tensor.h>\n")
    (tmp_path / "core" / "gsp.hpp").write_text('#include <vector>\n#include "faces/checks.h"\n')
    chain = torch_chain(tmp_path / "core" / "gsp.hpp", tmp_path)
    assert chain == ["gsp.hpp", "checks.h", "torch/csrc/stable/tensor.h"]


# Which folders of csrc/ each may include from, besides itself.
BELOW: dict[str, set[str]] = {"simd": set(), "core": {"simd"}, "cuda": {"faces"}, "faces": {"core", "simd"}}


def folder_faults(path: pathlib.Path, root: pathlib.Path = CSRC) -> list[str]:
    """Includes of `path` from a folder that its own does not stand on."""
    folder = path.relative_to(root).parts[0]
    faults = []
    for quoted, name in includes_of(path):
        origin = name.split("/")[0] if "/" in name else folder
        if quoted and origin not in BELOW[folder] | {folder}:
            faults.append(f"{folder}/{path.name} includes {name}")
    return faults


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.[chu]*")), ids=lambda path: str(path.relative_to(CSRC)))
def test_folders_stand_on_each_other(path: pathlib.Path) -> None:
    assert folder_faults(path) == []


@pytest.mark.parametrize(("where", "line"), [("simd", "core/image.hpp"), ("core", "faces/torch_checks.hpp")])
def test_a_folder_that_reaches_up_is_seen(tmp_path: pathlib.Path, where: str, line: str) -> None:
    (tmp_path / where).mkdir()
    (tmp_path / where / "x.hpp").write_text(f'#include "{line}"\n')
    assert len(folder_faults(tmp_path / where / "x.hpp", tmp_path)) == 1


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


def functions_of(module: str) -> dict[str, ast.FunctionDef]:
    body = ast.parse((PACKAGE / f"{module}.py").read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def test_each_op_is_found_by_its_name() -> None:
    names = op_names()
    assert len(names) == 10
    api, oracle, ops = functions_of("api"), functions_of("reference"), functions_of("ops")
    for name in names:
        assert name in api, f"api.py has no {name}"
        assert name in oracle, f"reference.py has no {name}"
        assert f"fake_{name}" in ops, f"ops.py has no fake_{name}"
        assert (CSRC / "core" / f"{name}.hpp").exists(), f"csrc/core/{name}.hpp is missing"
        if name == "mask_intersect":
            assert (CSRC / "cuda" / f"{name}.cuh").exists()
        else:
            page = functions_of(f"triton/{name}")
            assert f"launch_{name}" in page, f"triton/{name}.py has no launch_{name}"


def pages() -> list[pathlib.Path]:
    return [PACKAGE / "triton" / f"{name}.py" for name in op_names() if name != "mask_intersect"]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_an_op_is_a_thin_page(path: pathlib.Path) -> None:
    assert path.read_text().count("\n") <= MAX_PAGE
    assert "triton.jit" not in path.read_text()


def test_kernels_know_no_page() -> None:
    for path in (PACKAGE / "triton" / "kernels").glob("*.py"):
        for name, _ in imports_of(path.read_text(), "script_kernels.triton.kernels"):
            if name.startswith("script_kernels"):
                assert name.startswith(("script_kernels.triton.kernels", "script_kernels.options")), (path.name, name)


def test_only_options_spell_out_the_defaults() -> None:
    """The options of prune travel as one value: besides the public signatures nobody repeats them."""
    spelt = {
        str(path.relative_to(PACKAGE))
        for path in PYTHON_FILES
        if re.search(r"min_degree(: int)? = \d", path.read_text())
    }
    assert spelt == {"options.py", "api.py", "numpy.py", "reference.py"}
