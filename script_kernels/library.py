"""Loads the compiled libraries and remembers, for each that is not there, why."""

import dataclasses
import functools
import pathlib

BUILD_COMMAND = "pip install --no-build-isolation -e ."
_FOLDER = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled library of the package: `reason` says why it is not loaded, and is empty if it is."""

    name: str
    reason: str

    @property
    def loaded(self) -> bool:
        return not self.reason

    def missing(self) -> str:
        """What to tell a user whose call needs this library."""
        return (
            f"script_kernels: the library {self.name} is not loaded: {self.reason}. "
            f"To build it, run in the source tree: {BUILD_COMMAND}"
        )


@functools.cache
def load(name: str) -> Library:
    """Loads `name` (`_C_cpu`, `_C_cuda`), whose static initialisers register its ops with torch; once per process."""
    import torch

    if name == "_C_cuda" and torch.version.cuda is None:
        return Library(name, f"torch {torch.__version__} is built without CUDA")
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return Library(name, f"{path} does not exist")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another platform, or for a later torch than this one
        return Library(name, f"it does not load with torch {torch.__version__}: {error.__cause__ or error}")
    return Library(name, "")
