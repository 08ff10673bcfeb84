"""Makes the virtual environment of the tests on the real lmms-eval, on top of the one that runs this.

    .venv/bin/python tests/lmms/environment.py .venv-lmms      (a second call with nothing changed ends at once)

torch, transformers and this package are those of the environment below, found through a .pth file, so that only
lmms-eval and what it needs are downloaded. decord is what its `llava_hf` imports without asking for it. torchvision may
be a CUDA build on a CPU torch: see `tests/vllm/install.py`, which has the remedy.
"""

import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
from install import hash_of, output, patch_torchvision, run, stamp  # noqa: E402

PINNED = ("lmms-eval==0.7.3", "filelock==3.29.7", "decord==0.6.0")
KEPT = ("torch", "transformers")  # pip must not put others above those of the environment below


def install(venv: Path, python: Path) -> None:
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv)
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    below = sysconfig.get_path("purelib")
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")  # with the .pth files in it
    constraints = venv / "constraints.txt"
    read = f"import importlib.metadata as m; print(*(n + '==' + m.version(n) for n in {KEPT}), sep='\\n')"
    constraints.write_text(output(python, "-c", read))
    run(python, "-m", "pip", "install", "-q", "-c", constraints, *PINNED)
    patch_torchvision(python)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/lmms/environment.py FOLDER")
    venv = Path(sys.argv[1]).absolute()
    if venv == Path(sys.prefix):
        sys.exit(f"script-kernels: expected a folder other than the environment that runs this, got {venv}")
    below = " ".join([sys.version, sys.prefix, *(output(sys.executable, "-m", "pip", "show", n) for n in KEPT)])
    wanted = hash_of(Path(__file__).read_text() + below)
    stamp(venv / ".lmms", wanted, lambda: install(venv, venv / "bin" / "python"))


if __name__ == "__main__":
    main()
