"""Between the host and the device: copies that nobody waits for, moments of the device's clock, where weights are.

On a GPU every `.item()`, `.tolist()`, `nonzero()` and blocking copy waits until all queued work is done. A prompt's
layout is therefore worked out on the CPU, from one copy of the small inputs, and sent back without waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Mark = Any  # a moment: seconds of the host's clock, or on a GPU an event among its queued work


def execution_device(module: torch.nn.Module) -> torch.device:
    """Where the module computes: where Accelerate's hook, if there is one, brings its offloaded weights."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    devices = [p.device for p in module.parameters()] or [torch.device("cpu")]
    return next((device for device in devices if device.type != "meta"), devices[0])


def clock_of(model: torch.nn.Module) -> torch.device:
    """The device whose clock times a call: the host's where the model is spread over several."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return torch.device("cpu") if spread else execution_device(model)


@contextmanager
def own_weights(module: torch.nn.Module) -> Iterator[None]:
    """Brings a module's own offloaded parameters in for a method other than forward, which alone its hook sees."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def fetch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the tensors on the CPU, in one transfer per device (and one more for floating-point ones)."""
    fetched = dict(inputs)
    groups: dict[tuple[torch.device, bool], list[str]] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            groups.setdefault((value.device, value.is_floating_point()), []).append(name)
    for names in groups.values():
        packed = torch.cat([inputs[name].flatten() for name in names]).cpu()
        for name, part in zip(names, packed.split([inputs[name].numel() for name in names]), strict=True):
            fetched[name] = part.view(inputs[name].shape).to(inputs[name].dtype)
    return fetched


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, which nobody waits for: the copy is queued ahead of whatever reads it there."""
    # Towards the CPU the copy must have arrived before it is read, so that one does wait.
    return tensor.to(device, non_blocking=device.type != "cpu")


def mark(device: torch.device) -> Mark:
    """This point of the work queued on the device (CPU: the time now), without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(start: Mark, end: Mark) -> float:
    """Between two marks of one device; on a GPU, once it has come to the second."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)
