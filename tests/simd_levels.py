"""The SIMD levels as csrc/simd/levels.cmake lists them, and a build of the torch-free cores with their flags."""

import pathlib
import platform
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
SET = re.compile(r"^set\((\w+)((?: [^ )]+)*)\)$", re.MULTILINE)
VALUES = {name: rest.split() for name, rest in SET.findall((ROOT / "csrc/simd/levels.cmake").read_text())}
PROCESSOR = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def levels_of(processor: str = PROCESSOR) -> list[str]:
    """The levels of a processor, lowest first."""
    return VALUES.get(f"SIMD_LEVELS_{processor}", ["baseline"])


def build_cores(
    folder: pathlib.Path, main: pathlib.Path, compiler: str, flags: list[str], processor: str = PROCESSOR
) -> pathlib.Path:
    """Compiles a program on the cores with the same split of flags as CMakeLists.txt."""
    common = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    units = [(main, "main", ["-ffp-contract=off"]), (ROOT / "csrc/simd/dispatch.cpp", "dispatch", [])]
    for level in levels_of(processor):
        # GCC notes that other compilers pass vectors wider than the target's differently; none leaves its file.
        own = [f"-DSCRIPT_SIMD_LEVEL={level}", "-Wno-psabi", *VALUES["SIMD_FLAGS_ALL"], *VALUES[f"SIMD_FLAGS_{level}"]]
        units.append((ROOT / "csrc/simd/level.cpp", level, own))
    objects = []
    for source, name, own in units:
        objects.append(folder / f"{name}.o")
        subprocess.run([*common, *own, "-c", str(source), "-o", str(objects[-1])], check=True, timeout=300)
    program = folder / "cores"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True, timeout=300)
    return program
