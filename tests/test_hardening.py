"""The libraries are built with the compiler's and the linker's hardening."""

import pathlib
import platform
import shutil
import subprocess

import pytest

import script_kernels

PACKAGE = pathlib.Path(script_kernels.__file__).parent
LIBRARIES = sorted(path.name for path in PACKAGE.glob("*.so"))
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="ELF")


def read(*arguments: str) -> str:
    tool = shutil.which("readelf")
    assert tool is not None, "binutils come with every compiler"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_addresses_cannot_be_written_and_nothing_on_the_stack_runs(library: str) -> None:
    path = str(PACKAGE / library)
    dynamic, segments = read("-dW", path), read("-lW", path)
    assert "BIND_NOW" in dynamic or " NOW" in dynamic
    assert "GNU_RELRO" in segments
    (stack,) = [line for line in segments.splitlines() if "GNU_STACK" in line]
    assert "RWE" not in stack


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name.startswith(("_C_cpu", "_core"))])
def test_the_stack_is_guarded(library: str) -> None:
    assert "__stack_chk_fail" in read("--dyn-syms", "-W", str(PACKAGE / library))
