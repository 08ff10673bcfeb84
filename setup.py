"""Builds the C++ libraries with CMake and Ninja, against the torch that is installed; all else is in pyproject.toml.

Environment: SCRIPT_KERNELS_CUDA=auto|0|1 (build the CUDA library when it can be built, never, or fail if it cannot),
SCRIPT_KERNELS_CUDA_ARCHS="80;90" (CUDA architectures), CMAKE_BUILD_PARALLEL_LEVEL (jobs), CXX, CUDACXX.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
PACKAGE = "script_kernels"


def tool(name: str) -> str:
    """A build tool of this interpreter's environment, which need not be on PATH, else the system's."""
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))
    if path is None:
        sys.exit(f"script-kernels: {name} is needed to build: {sys.executable} -m pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries into the package, in the source tree or where a wheel is staged."""

    def destination(self) -> Path:
        if self.inplace or self.editable_mode:
            return SOURCE / PACKAGE
        return Path(self.build_lib).resolve() / PACKAGE

    def run(self) -> None:
        cuda = os.environ.get("SCRIPT_KERNELS_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            sys.exit(f"script-kernels: SCRIPT_KERNELS_CUDA: expected auto, 0 or 1, got {cuda!r}")
        cmake = tool("cmake")
        build = SOURCE / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "SCRIPT_KERNELS_CUDA": cuda,
            "SCRIPT_KERNELS_CUDA_ARCHS": os.environ.get("SCRIPT_KERNELS_CUDA_ARCHS", ""),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call([cmake, "-S", str(SOURCE), "-B", str(build), "-G", "Ninja", *definitions])
        subprocess.check_call([cmake, "--build", str(build)])
        for stale in self.destination().glob("_C_*.so"):  # such as a CUDA library from before SCRIPT_KERNELS_CUDA=0
            stale.unlink()
        subprocess.check_call([cmake, "--install", str(build), "--prefix", str(self.destination())])

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.destination().glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # One extension is named so that setuptools runs the build and gives the wheel a platform tag.
    ext_modules=[Extension(f"{PACKAGE}._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
