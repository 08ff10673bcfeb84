"""The CUDA sources compiled by nvcc for every target, against the headers of the installed torch, a CPU one too."""

import pathlib
import re
import shutil
import subprocess

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TORCH = pathlib.Path(torch.__file__).parent
# Found in libtorch_cuda, so nowhere on a CPU torch.
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream"}
# The registers of a multiprocessor, shared by the 1024 threads that the kernels are bounded to.
MOST_REGISTERS = 64
STATIC_SHARED_BYTES = 48 << 10

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

KERNEL_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_cuda(source: pathlib.Path, output: pathlib.Path, *flags: str) -> str:
    """Compiles for all targets and returns what ptxas says of the kernels."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [str(NVCC), "-std=c++17", "-O3", "-c", "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-fPIC,-Wall"]
    command += [*targets, "--threads=2", f"-I{CSRC}", *flags, str(source), "-o", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """The object of one source, and ptxas's report."""
    output = tmp_path_factory.mktemp("cuda_compile") / f"{request.param.stem}.o"
    stable = ["-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    return output, compile_cuda(request.param, output, *stable)


def test_there_are_cuda_sources() -> None:
    assert "mask_intersect" in [source.stem for source in SOURCES]


def test_no_kernel_spills_on_any_target(compiled: tuple[pathlib.Path, str]) -> None:
    kernels = [match.groupdict() for match in KERNEL_REPORT.finditer(compiled[1])]
    assert {int(kernel["architecture"]) for kernel in kernels} == set(ARCHITECTURES), compiled[1]
    for kernel in kernels:
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert [kernel[key] for key in ("stack", "stores", "loads")] == ["0", "0", "0"], kernel
        assert int(kernel["registers"]) <= MOST_REGISTERS, kernel
        assert shared is None or int(shared[1]) <= STATIC_SHARED_BYTES, kernel


def test_the_spill_check_sees_a_spill(tmp_path: pathlib.Path) -> None:
    """A kernel that needs more than the registers it may have: else the test above could not fail."""
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spill(const float* in, float* out) {\n"
        "  float x[96];\n"
        "  for (int i = 0; i < 96; ++i) x[i] = in[threadIdx.x + 1024 * i];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) out[threadIdx.x + 1024 * i] = x[i] * x[95 - i] + x[(i * 7) % 96];\n"
        "}\n"
    )
    reports = list(KERNEL_REPORT.finditer(compile_cuda(source, tmp_path / "spill.o")))
    assert len(reports) == len(ARCHITECTURES)
    assert all(int(report["stores"]) + int(report["stack"]) > 0 for report in reports)


def test_every_symbol_is_there_at_load_time(compiled: tuple[pathlib.Path, str]) -> None:
    """What the object leaves undefined is exported by torch's CPU library, the CUDA runtime or the C++ runtime."""

    def symbols(path: pathlib.Path, *flags: str) -> set[str]:
        text = subprocess.run(["nm", *flags, str(path)], check=True, capture_output=True, text=True).stdout
        return {line.split()[-1].split("@")[0] for line in text.splitlines() if line.strip()}

    torch_symbols = symbols(TORCH / "lib" / "libtorch_cpu.so", "-D", "--defined-only")
    wanted = {
        name for name in symbols(compiled[0], "-u") if name.startswith(("aoti_", "torch_", "_ZN5torch", "_ZN3c10"))
    }
    assert wanted, "the object uses nothing of torch"
    assert wanted - torch_symbols <= CUDA_SHIMS
