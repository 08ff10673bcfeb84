"""Fills a folder with timm and the torchvision that it imports, for PYTHONPATH:

    python tests/timm_folder.py build/timm       (a second call with nothing changed ends at once)

A few types of transformers have an encoder of timm's. torchvision may be a CUDA build on a CPU torch (see
`tests/vllm/install.py`, which has the remedy), and with it transformers takes other image processors: so neither goes
into the environment of the other tests.
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "vllm"))
from install import patch_torchvision_in, run, stamp

# torchvision's minor goes with torch's.
PACKAGES = ("timm==1.0.31", f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*")


def install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PACKAGES)
    patch_torchvision_in(folder)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/timm_folder.py FOLDER")
    folder = Path(sys.argv[1]).absolute()
    stamp(folder / ".timm", f"{sys.version} {PACKAGES}", lambda: install(folder))


if __name__ == "__main__":
    main()
