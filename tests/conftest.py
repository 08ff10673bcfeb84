"""Fixtures: the devices and the implementations that the op tests run on."""

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

import script_kernels
from script_kernels import reference

# The default examples are the same in every run; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
else:
    # Triton reads this when it is imported, by whichever test module comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Backend:
    """One implementation of the ops on one device: ``backend.<op>(...)`` calls it."""

    def __init__(self, namespace: Any, device: str) -> None:
        self._namespace = namespace
        self.device = device

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return getattr(self._namespace, op)


def _devices() -> list[Any]:
    return [pytest.param(d, id=d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]


@pytest.fixture(scope="session", params=_devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def op(device: str) -> Backend:
    """The compiled op."""
    return Backend(script_kernels, device)


@pytest.fixture(scope="session", params=["reference", "op"])
def backend(request: pytest.FixtureRequest, device: str) -> Backend:
    """The oracle and the compiled op, held to the same contract."""
    return Backend(reference if request.param == "reference" else script_kernels, device)
