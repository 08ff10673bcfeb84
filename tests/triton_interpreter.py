"""The Triton launchers as a backend of the op tests: on the GPU where there is one, else on CPU tensors, interpreted.

Triton reads TRITON_INTERPRET when its modules are imported, so this module comes before any of `script_kernels.triton`.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from script_kernels import reference
from script_kernels.options import GspOptions, PruneOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

# NaN and Inf rows go through the products and are dropped afterwards; NumPy, under the interpreter, says so.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class TritonBackend:
    """``backend.<op>(...)`` calls ``launch_<op>``; mask_intersect, which is C++, comes from the oracle."""

    device = DEVICE

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op == "mask_intersect":
            return reference.mask_intersect
        launch = getattr(importlib.import_module(f"script_kernels.triton.{op}"), f"launch_{op}")
        options = {"gsp": GspOptions, "prune": PruneOptions, "prune_varlen": PruneOptions}.get(op)
        return launch if options is None else functools.partial(with_options, launch, options)


def with_options(launch: Callable[..., Any], options: type, *arguments: Any, **given: Any) -> Any:
    """The launcher called as the op is, with options as keywords."""
    own = {name: given.pop(name) for name in ("aligned", "query_mask") if name in given}
    return launch(*arguments, options(**given), **own)


BACKEND = TritonBackend()
