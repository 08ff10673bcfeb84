"""How often `prune_inputs` makes the host wait for the device, counted on a device that is only pretended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vlm import IMAGE_FAMILIES, SIZES, VIDEO_FAMILIES, Video, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from script_kernels.transformers import PrunedInputs, prune_inputs
from script_kernels.transformers.encode import encode

aten = torch.ops.aten
CPU, AWAY = torch.device("cpu"), torch.device("meta")  # any other device would do: nothing is ever put there
# What these return, or how much, is known only once the device has done all it was given.
READS = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.repeat_interleave),
}


class Away(Tensor):
    """A tensor that says it is on another device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        tensor = Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), dtype=here.dtype, device=AWAY)
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: expected inside the mode that computes it")


def send_away(values: Any) -> Any:
    return tree_map_only(Tensor, Away, values)


def bring_here(values: Any) -> Any:
    return tree_map_only(Away, lambda tensor: tensor.here, values)


class PretendedDevice(TorchDispatchMode):
    """Computes on the CPU what is asked of `Away` tensors, and notes what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        away = any(isinstance(t, Away) for t in tensors)
        target = kwargs.get("device") or (AWAY if away else CPU)
        if op is aten._to_copy and (target == AWAY) != away:
            # Of the copies between the two only one is not waited for: to the device, and told so.
            if away or not kwargs.get("non_blocking"):
                self.waits.append(f"copy of {args[0].numel()} to {target}")
        elif away:
            by_mask = op in (aten.index, aten.index_put, aten.index_put_) and any(
                isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]
            )
            # Indices on the host are copied to the device, and waited for, on the way.
            mixed = any(t.ndim and not isinstance(t, Away) for t in tensors)
            if op in READS or by_mask or mixed:
                self.waits.append(str(func))
        out = func(*bring_here(args), **bring_here(kwargs | ({"device": CPU} if "device" in kwargs else {})))
        return send_away(out) if target == AWAY else out


def prune_away(
    model: Any, inputs: dict, monkeypatch: pytest.MonkeyPatch, **arguments: Any
) -> tuple[PrunedInputs, list[str]]:
    """`prune_inputs` with everything but the pixels on a pretended device, and its waits without the encoder's."""
    with torch.no_grad():
        _, outputs, _ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
    for modality, output in outputs.items():
        fields = {"pooler_output": send_away(output.pooler_output)}
        if getattr(output, "deepstack_features", None) is not None:
            fields["deepstack_features"] = send_away(output.deepstack_features)
        encoded = type(output)(**fields)
        monkeypatch.setattr(model.model, f"get_{modality}_features", lambda encoded=encoded, **_: encoded)
    embeddings = torch.nn.Embedding(1, 1)
    weight = model.get_input_embeddings().weight.detach()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: embeddings)
    with PretendedDevice() as device, torch.no_grad():
        embeddings.weight = torch.nn.Parameter(Away(weight), requires_grad=False)
        pixels = {name: value for name, value in inputs.items() if name.startswith("pixel_values")}
        pruned = prune_inputs(model, send_away(inputs) | pixels, **arguments)
    return pruned, device.waits


@pytest.mark.parametrize("per", ["image", "tile"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("family", "kind"), [(f, "image") for f in IMAGE_FAMILIES] + [(f, "video") for f in VIDEO_FAMILIES]
)
def test_the_host_waits_twice_for_the_device(family, kind, count, per, monkeypatch):
    """Once for the ids and sizes, once for what was chosen, however many prompts and images there are."""
    small, large = SIZES[family]
    prompts = [[4, small, 6], [2, large, 3, small, 9]]
    if kind == "video":
        prompts = [[3, Video(), 7], [2, Video(), 9, Video(), 1]]
    model, inputs = make_inputs(family, prompts[:count])
    inputs["labels"] = inputs["input_ids"].clone()
    expected = prune_inputs(model, inputs, keep=3, per=per, newlines="lines")
    pruned, waits = prune_away(model, inputs, monkeypatch, keep=3, per=per, newlines="lines")
    assert len(waits) == 2, waits
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        assert pruned[name].device == AWAY
        assert torch.equal(pruned[name].here, expected[name])
    for one, other in zip(pruned.keep_indices, expected.keep_indices, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(pruned.scores, expected.scores, strict=True):
        assert torch.equal(one.here.nan_to_num(-1), other.nan_to_num(-1))
    features = bring_here(pruned["mm_encoder_outputs"][kind].pooler_output)
    for one, other in zip(features, expected["mm_encoder_outputs"][kind].pooler_output, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.cpu(),
        lambda t: int(t[0]),
        lambda t: bool((t > 0).all()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t[torch.tensor([0])],
        lambda t: torch.arange(3).to(t.device),
    ],
)
def test_the_pretended_device_sees_a_wait(wait):
    with PretendedDevice() as device:
        wait(Away(torch.arange(4)))
    assert len(device.waits) == 1
