"""The Triton launchers as a backend of the op tests: on the GPU where there is one, else on CPU tensors, interpreted.

Triton reads TRITON_INTERPRET when its modules are imported, so this module comes before any of `script_kernels.triton`.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from script_kernels import reference

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
        return getattr(importlib.import_module(f"script_kernels.triton.{op}"), f"launch_{op}")


BACKEND = TritonBackend()
