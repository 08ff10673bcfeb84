"""What is installed and what of it works here: the facts behind `script-kernels info`."""

import importlib.metadata
import importlib.util
import pathlib
import platform

from . import __version__, library


def collect() -> dict[str, str]:
    """Versions, libraries loaded or why not, SIMD level, CUDA architectures, GPUs, Triton: name -> fact, in order.

    Works without PyTorch and without the compiled libraries, and says so.
    """
    facts = {
        "script-kernels": f"{__version__} in {pathlib.Path(__file__).resolve().parent}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "NumPy": _version("numpy"),
    }
    facts.update(_torch_facts())
    facts["Triton"] = _version("triton")
    facts.update(_build_facts())
    return facts


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_facts() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"PyTorch": "not installed"}
    import torch

    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    facts = {"PyTorch": f"{torch.__version__}, {cuda}, {torch.get_num_threads()} CPU threads"}
    for name, title in (("_C_cpu", "CPU ops"), ("_C_cuda", "CUDA ops")):
        loaded = library.load(name)
        facts[title] = f"{name} is loaded" if loaded.loaded else f"{name} is not loaded: {loaded.reason}"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["GPUs"] = ", ".join(f"{d.name} (sm_{d.major}{d.minor})" for d in devices) or "none"
    return facts


def _build_facts() -> dict[str, str]:
    try:
        from . import _core
    except ImportError as error:
        return {"C++ module": f"_core is not loaded: {error}. To build it: {library.BUILD_COMMAND}"}
    build = _core.build_info()
    return {
        "C++ module": f"_core is loaded: {build['compiler']}, against torch {build['torch']}",
        "SIMD level": build["simd"],
        "CUDA architectures": build["cuda_archs"] or "none: built without CUDA",
    }
