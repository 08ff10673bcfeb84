"""The Triton launchers as a backend of the op tests: on the GPU where there is one, else on CPU tensors, interpreted.

Triton reads TRITON_INTERPRET when its modules are imported, so this module comes before any of `script_kernels.triton`.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from script_kernels import reference
from script_kernels.options import GspOptions, PruneOptions, QcspOptions

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
        options = {"gsp": GspOptions, "qcsp": QcspOptions, "prune": PruneOptions, "prune_varlen": PruneOptions}.get(op)
        return launch if options is None else functools.partial(with_options, launch, options)


def with_options(launch: Callable[..., Any], options: type, *arguments: Any, **given: Any) -> Any:
    """The launcher called as the op is, with options as keywords; what is none of them is the launcher's own."""
    names = {field.name for field in dataclasses.fields(options)}
    own = {name: given.pop(name) for name in list(given) if name not in names}
    return launch(*arguments, options(**given), **own)


BACKEND = TritonBackend()


@contextlib.contextmanager
def bounds_checked() -> Iterator[list[int]]:
    """Every access of an interpreted kernel must lie within a tensor of its launch; yields a count of those checked."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    real, executor = interpreter._interpreter, interpreter.GridExecutor
    call = executor.__call__
    spans = np.empty((0, 2), dtype=np.uint64)
    checked = [0]

    def check(pointers: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        used = pointers.reshape(-1) if mask is None else pointers.reshape(-1)[mask.reshape(-1).astype(bool)]
        used = used.astype(np.uint64)
        inside = ((used[:, None] >= spans[:, 0]) & (used[:, None] + np.uint64(size) <= spans[:, 1])).any(1)
        assert inside.all(), f"{int((~inside).sum())} accesses outside the tensors of the launch"
        checked[0] += len(used)

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal spans
        tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.numel()]
        reach = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 for x in tensors]
        spans = np.array(
            [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(tensors, reach, strict=True)],
            dtype=np.uint64,
        ).reshape(-1, 2)
        return call(self, *arguments, **options)

    class Checked:
        """The memory of the interpreter, looked over."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            check(pointers, mask, np.dtype(dtype).itemsize)
            return real.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, value: Any, mask: Any) -> Any:
            check(pointers, mask, value.dtype.itemsize)
            return real.store(pointers, value, mask)

        def atomic_rmw(self, kind: Any, pointers: Any, value: Any, mask: Any, sem: Any) -> Any:
            check(pointers, mask, value.dtype.itemsize)
            return real.atomic_rmw(kind, pointers, value, mask, sem)

    interpreter._interpreter, executor.__call__ = Checked(), record
    try:
        yield checked
    finally:
        interpreter._interpreter, executor.__call__ = real, call
