"""Lays out two projects for Hugging Face's kernel-builder (build.toml, edition 5): python tools/hub.py FOLDER

FOLDER/script-kernels    the C++ and CUDA ops, by PyTorch's stable ABI, with the Triton ones
FOLDER/script-kernels-triton   `universal`: Python and Triton only, nothing compiled ahead

A hub kernel may be loaded beside another version of itself, so its ops stand in a namespace of its own, which
kernel-builder makes up and tells in `_ops.py`; and it is no package on the path, so it imports itself relatively. The
copies laid out here differ from the sources in just that. Uploading them is not this script's affair.
"""

import argparse
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = ("api", "checks", "ops", "options", "version")

GENERAL = """\
[general]
name = "{name}"
version = 1
edition = 5
license = "Apache-2.0"
backends = [{backends}]
"""

COMPILED = """
[torch]
src = ["torch-ext/torch_binding.cpp"]

[torch.stable-abi]
cpu = "2.10"
cuda = "2.10"

# The inner loops, once per instruction set: each file allows itself one, and the best that the CPU has runs.
[kernel.simd]
backend = "cpu"
depends = []
include = ["csrc"]
cxx-flags = ["-ffp-contract=fast"]
src = [{levels}]

[kernel.cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = ["-ffp-contract=off"]
src = [{cpu}]

[kernel.cuda]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
src = [{cuda}]
"""

BINDING = """\
// The ops register themselves in csrc/faces and csrc/cuda; this makes the library a module that Python imports.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""

LIBRARY = '''\
"""Tells which of the compiled ops are there; kernel-builder's _ops has loaded what there is."""

import dataclasses

import torch

from . import _ops


@dataclasses.dataclass(frozen=True)
class Library:
    name: str
    loaded: bool

    def missing(self) -> str:
        """What to tell a user whose call needs this library."""
        return f"script-kernels: this build has no {self.name.removeprefix('_C_').upper()} op of this name"


def load(name: str) -> Library:
    key = name.removeprefix("_C_").upper()
    op = _ops.add_op_namespace_prefix("mask_intersect")
    there = op in torch._C._dispatch_get_all_op_names() and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    return Library(name, there)
'''


def relative(source: str, depth: int) -> str:
    """A module's text with its imports of script_kernels made relative; depth: packages between it and the top."""
    source = re.sub(r"\bfrom script_kernels\.", "from " + "." * (depth + 1), source)
    source = re.sub(r"\bfrom script_kernels import", "from " + "." * (depth + 1) + " import", source)
    if re.search(r"^\s*import script_kernels", source, re.MULTILINE):
        raise ValueError("an `import script_kernels` cannot be made relative")
    return source


def in_own_namespace(module: str, source: str) -> str:
    """The text of api.py or ops.py with the ops in the namespace of `_ops`; raises if it is not as expected."""
    changes = {
        "api": [("torch.ops.script.", "_ops.ops."), ("from . import checks, ops", "from . import _ops, checks, ops")],
        "ops": [
            ('Library("script", "FRAGMENT")', 'Library(_ops.add_op_namespace_prefix("")[:-2], "FRAGMENT")'),
            ('f"script::{_op.name}"', "_ops.add_op_namespace_prefix(_op.name)"),
            ("from . import checks, library", "from . import _ops, checks, library"),
        ],
    }
    for old, new in changes.get(module, []):
        if old not in source:
            raise ValueError(f"{module}.py: expected {old!r} in it")
        source = source.replace(old, new)
    return source


def lay_python(project: pathlib.Path, name: str) -> None:
    package = project / "torch-ext" / name.replace("-", "_")
    package.mkdir(parents=True)
    source = ROOT / "script_kernels"
    for module in MODULES:
        text = (source / f"{module}.py").read_text()
        (package / f"{module}.py").write_text(in_own_namespace(module, relative(text, 0)))
    for path in sorted((source / "triton").rglob("*.py")):
        target = package / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relative(path.read_text(), len(path.relative_to(source).parts) - 1))
    (package / "library.py").write_text(LIBRARY)
    names = re.findall(r'^    "(\w+)",$', (source / "api.py").read_text().partition("]")[0], re.MULTILINE)
    lines = ['"""Exact, fast visual-token pruning for vision-language models."""', ""]
    lines += ["from .api import " + ", ".join(names), "from .version import __version__", ""]
    lines += [f"__all__ = {[*names, '__version__']!r}".replace("'", '"'), ""]
    (package / "__init__.py").write_text("\n".join(lines))


def lay_cpp(project: pathlib.Path) -> dict[str, list[str]]:
    """Copies csrc/; returns the source lists of the kernels in build.toml."""
    shutil.copytree(ROOT / "csrc", project / "csrc", ignore=shutil.ignore_patterns("numpy.cpp"))
    for path in (project / "csrc" / "faces" / "torch_cpu.cpp", project / "csrc" / "cuda" / "mask_intersect.cu"):
        text, count = re.subn(
            r"STABLE_TORCH_LIBRARY_IMPL\(script, (\w+), (\w+)\)",
            r"STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, \1, \2)",
            path.read_text(),
        )
        if count != 1:
            raise ValueError(f"{path.name}: expected one registration, got {count}")
        path.write_text('#include "registration.h"\n' + text)
    (project / "torch-ext" / "torch_binding.cpp").write_text(BINDING)

    # kernel-builder gives a file the same flags on every processor, so a level asks for its instructions itself.
    simd = project / "csrc" / "simd"
    (simd / "level.cpp").rename(simd / "level.hpp")  # included by each level, not a source of its own
    levels = []
    settings = (ROOT / "csrc" / "simd" / "levels.cmake").read_text()
    flags = dict(re.findall(r"^set\(SIMD_FLAGS_(\w+) ?(.*)\)$", settings, re.MULTILINE))
    for processor, of_processor in re.findall(r"^set\(SIMD_LEVELS_(\w+) (.*)\)$", settings, re.MULTILINE):
        for level in of_processor.split():
            path = simd / f"level_{level}.cpp"
            # -mavx2 -> avx2, -march=armv8.2-a -> arch=armv8.2-a
            target = ",".join(flag.removeprefix("-m") for flag in flags[level].split())
            pragma = f'#pragma GCC target("{target}")\n' if target else ""
            body = f'{pragma}#define SCRIPT_SIMD_LEVEL {level}\n#include "level.hpp"\n'
            path.write_text(body if level == "baseline" else f"#if defined(__{processor}__)\n{body}#endif\n")
            if str(path.relative_to(project)) not in levels:
                levels.append(str(path.relative_to(project)))
    headers = sorted(str(p.relative_to(project)) for p in (project / "csrc").rglob("*.hpp"))
    return {
        "levels": [*levels, *[h for h in headers if "/simd/" in h]],
        "cpu": ["csrc/faces/torch_cpu.cpp", "csrc/simd/dispatch.cpp", *headers],
        "cuda": ["csrc/cuda/mask_intersect.cu", "csrc/cuda/mask_intersect.cuh", "csrc/faces/torch_checks.hpp"],
    }


def listed(names: list[str]) -> str:
    return "\n" + "".join(f'  "{name}",\n' for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="must not exist yet")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"folder: expected one that does not exist, got {folder}")
    for name, backends in (("script-kernels", '"cpu", "cuda"'), ("script-kernels-triton", '"cuda", "rocm"')):
        project = folder / name
        lay_python(project, name)
        toml = GENERAL.format(name=name, backends=backends)
        if name.endswith("-triton"):
            toml += "\n[torch-noarch]\n"
        else:
            toml += COMPILED.format(**{key: listed(names) for key, names in lay_cpp(project).items()})
        (project / "build.toml").write_text(toml)
        print(project)
    return 0


if __name__ == "__main__":
    sys.exit(main())
