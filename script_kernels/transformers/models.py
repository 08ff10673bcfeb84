"""The visual tokens of each supported model: features, layout and where they go in the prompt.

Every adapter runs the model's own encoder (`get_image_features`, `get_video_features`) and describes what came out
as one `Visual` per image or video. Layouts are derived from the model's own packing code, never from the values.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
MROPE = ("qwen2_5_vl", "qwen3_vl")
Encoder = Callable[[str], Any]  # runs the model's encoder of one modality
Mark = Any  # a moment: seconds of the host's clock, or on a GPU an event among its queued work
# Inputs that the models' encoders read number by number: given from the CPU, they make nobody wait for the device.
_READ_BY_HOST = ("image_sizes", "batch_num_images")
Encoded = tuple[list["Visual"], dict[str, Any]]  # the visuals, and the encoder's output per modality


@dataclass
class Visual:
    """One image or video as the language model would get it.

    features: (L, D), rows in placeholder order. planes: DeepStack features, one (L, D) per injected layer.
    tile: (L,) int64, the tile (or frame) a row belongs to. newline: (L,) bool, rows that hold the learned
    `image_newline` vector. line: (L,) int64, the line a newline row ends; -1 for rows in no line.
    prompt, columns: where its placeholders stand in the batch, set by `_place`.
    """

    modality: str
    features: Tensor
    tile: Tensor
    newline: Tensor
    line: Tensor
    planes: list[Tensor] = field(default_factory=list)
    prompt: int = -1
    columns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


def _plain(modality: str, features: Tensor, tile: Tensor | None = None, planes: list[Tensor] | None = None) -> Visual:
    length = features.shape[0]
    return Visual(
        modality,
        features,
        torch.zeros(length, dtype=torch.long) if tile is None else tile,
        torch.zeros(length, dtype=torch.bool),
        torch.full((length,), -1),
        planes or [],
    )


def _llava(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    out = run("image")
    return [_plain("image", features) for features in out.pooler_output], {"image": out}


def _packed_layout(
    model: PreTrainedModel, tiles: int, image_size: list[int], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tile, newline mask and line of every row of one any-resolution image.

    The model's packing runs on the (row, column) of each token instead of its features, so that unpadding and
    resizing are followed exactly; -1 marks newlines and -2 the base view.
    """
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    across = 1
    coordinates = torch.full((tiles, side * side, 2), -2.0)
    if tiles > 1:
        source = sys.modules[type(model.base_model).__module__]
        _, across = source.get_anyres_image_grid_shape(
            image_size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        inside = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        for crop in range(tiles - 1):
            coordinates[crop + 1] = inside + side * torch.tensor(divmod(crop, across))
    packed, _ = model.base_model.pack_image_features(
        [coordinates], [image_size], image_newline=torch.tensor([-1.0, -1.0]), **options
    )
    position = packed[0]
    newline = position[:, 0] == -1
    base = position[:, 0] == -2
    row, column = (position + 0.5).floor().long().unbind(1)
    tile = torch.where(base | newline, 0, 1 + row.clamp(min=0) // side * across + column.clamp(min=0) // side)
    line = newline.cumsum(0) - newline.long()
    if tiles > 1:
        line[base] = -1
    return tile, newline, line


# Layouts that were worked out, per model: a few small tensors for each image size that came up.
_layouts: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, tuple[Tensor, Tensor, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _packed_visuals(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    pooled: list[Tensor],
    cropped: list[bool],
    options: dict[str, Any],
) -> list[Visual]:
    source = sys.modules[type(model.base_model).__module__]
    config = model.config
    layouts = _layouts.setdefault(model, {})
    grids = tuple(map(tuple, config.image_grid_pinpoints))
    visuals = []
    sizes = inputs["image_sizes"]
    sizes = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    for features, sides, crop in zip(pooled, sizes, cropped, strict=True):
        size = [int(side) for side in sides]
        key = (*size, crop, grids, *options.values())
        if key not in layouts:
            side = config.vision_config.image_size
            tiles = source.image_size_to_num_patches(size, config.image_grid_pinpoints, side) if crop else 1
            layouts[key] = _packed_layout(model, tiles, size, options)
        tile, newline, line = layouts[key]
        if len(tile) != len(features):
            raise ValueError(
                f"pixel_values: expected {len(tile)} packed tokens for an image of size {size}, got {len(features)}; "
                "this combination of vision tower and feature selection is not supported"
            )
        visuals.append(Visual("image", features, tile, newline, line))
    return visuals


def _llava_next(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    out = run("image")
    strategy = inputs.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    cropped = [True] * len(out.pooler_output)
    options = {"vision_feature_select_strategy": strategy}
    return _packed_visuals(model, inputs, out.pooler_output, cropped, options), {"image": out}


def _llava_onevision(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    if PIXELS["image"] in inputs:
        out = run("image")
        counts = inputs.get("batch_num_images")
        # Only a prompt's single image is cut into tiles; several images get one view each.
        cropped = [True] * len(out.pooler_output) if counts is None else [n == 1 for n in counts for _ in range(n)]
        options = {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio}
        visuals += _packed_visuals(model, inputs, out.pooler_output, cropped, options)
        outputs["image"] = out
    if PIXELS["video"] in inputs:
        out = run("video")
        frames = inputs[PIXELS["video"]].shape[1]
        for features in out.pooler_output:
            length = features.shape[0]
            newline = torch.zeros(length, dtype=torch.bool)
            newline[-1] = True
            tile = torch.arange(length) // ((length - 1) // frames)
            tile[-1] = 0
            visuals.append(Visual("video", features, tile, newline, torch.zeros(length, dtype=torch.long)))
        outputs["video"] = out
    return visuals, outputs


def _internvl(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """Tiles arrive without image boundaries; an image is one unbroken run of placeholders, a video frame likewise."""
    out = run("image")
    tiles, per_tile, width = out.pooler_output.shape
    flat = out.pooler_output.reshape(tiles * per_tile, width)
    visuals: list[Visual] = []
    start = 0
    # A column of zeros on both sides, so that every run of ones has a beginning and an end in its own row.
    steps = pad((ids == model.config.image_token_id).int(), (1, 1)).diff().flatten()
    begins, ends = (steps == 1).nonzero()[:, 0], (steps == -1).nonzero()[:, 0]
    for length in (ends - begins).tolist():
        features = flat[start : start + length]
        visuals.append(_plain("image", features, torch.arange(len(features)) // per_tile))
        start += length
    if start != len(flat):
        raise ValueError(f"input_ids: expected {len(flat)} image placeholders for pixel_values, got {start}")
    return visuals, {"image": out}


def _qwen(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    for modality, pixels in PIXELS.items():
        if pixels not in inputs:
            continue
        out = run(modality)
        layers = getattr(out, "deepstack_features", None) or []
        grids = inputs[f"{modality}_grid_thw"].tolist()
        for i, features in enumerate(out.pooler_output):
            tile = torch.arange(len(features)) // (len(features) // grids[i][0])
            visuals.append(_plain(modality, features, tile, [layer[i] for layer in layers]))
        outputs[modality] = out
    return visuals, outputs


Adapter = Callable[["PreTrainedModel", Mapping[str, Any], Tensor, Encoder], Encoded]
ADAPTERS: dict[str, tuple[str, Adapter, tuple[str, ...]]] = {
    "llava": ("LLaVA-1.5", _llava, ("image",)),
    "llava_next": ("LLaVA-NeXT", _llava_next, ("image",)),
    "llava_onevision": ("LLaVA-OneVision", _llava_onevision, ("image", "video")),
    "internvl": ("InternVL", _internvl, ("image",)),
    "qwen2_5_vl": ("Qwen2.5-VL", _qwen, ("image", "video")),
    "qwen3_vl": ("Qwen3-VL", _qwen, ("image", "video")),
}


# By function: a bound method's would be lost with it, and kept, it would hold the model.
_parameters: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a function's or method's parameters; inspecting them takes a hundred times as long as this."""
    key = getattr(function, "__func__", function)
    if key not in _parameters:
        _parameters[key] = tuple(inspect.signature(key).parameters)
    return _parameters[key]


def check_model(model: PreTrainedModel) -> str:
    """The model's `model_type`, or a TypeError that names the supported models."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ADAPTERS:
        supported = ", ".join(f"{name} ({key})" for key, (name, _, _) in ADAPTERS.items())
        raise TypeError(
            f"model: expected one of {supported}, got {type(model).__name__} with model_type {model_type!r}"
        )
    if "mm_encoder_outputs" not in parameters(type(model).forward):
        import transformers

        raise RuntimeError(
            f"transformers: expected version >= 5.18 (mm_encoder_outputs), got {transformers.__version__}"
        )
    return model_type


def text_config(model: PreTrainedModel) -> Any:
    """The language model's config, by the name that all supported models give it: `get_text_config` searches for it."""
    return model.config.text_config


def token_id(model: PreTrainedModel, modality: str) -> int | None:
    """The placeholder's id, or None where the model has none for this modality."""
    return getattr(model.config, f"{modality}_token_id", None)


# --- between the host and the device

# On a GPU every `.item()`, `.tolist()`, `nonzero()` and blocking copy waits until all queued work is done. A prompt's
# layout is therefore worked out on the CPU, from one copy of the small inputs, and sent back without waiting.


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


# --- encoding


def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor, host: Mapping[str, Any] | None = None
) -> tuple[list[Visual], dict[str, Any], list[tuple[Mark, Mark]]]:
    """Encodes all images, then all videos, and finds each one's placeholders.

    ids, mask: (B, S) on the CPU. host: the inputs as `fetch` returns them, if they are not on the CPU. Returns the
    visuals, the encoder's output per modality and the marks before and after each run of the model's own encoders.
    """
    _, adapter, _ = ADAPTERS[check_model(model)]
    device = next(model.parameters()).device
    host = inputs if host is None else host
    runs: list[tuple[Mark, Mark]] = []

    def run(modality: str) -> Any:
        encoder = getattr(model.base_model, f"get_{modality}_features")
        names = parameters(encoder)  # what `generate` passes on as well
        passed = {name: (host if name in _READ_BY_HOST else inputs)[name] for name in names if name in inputs}
        start = mark(device)
        out = encoder(**passed, return_dict=True)
        runs.append((start, mark(device)))
        return out

    unpadded = ids.masked_fill(mask == 0, -1)
    visuals, outputs = adapter(model, host, unpadded, run)
    for modality in outputs:
        placeholder = getattr(model.config, f"{modality}_token_id")
        _place([v for v in visuals if v.modality == modality], unpadded == placeholder)
    return visuals, outputs, runs


def _place(visuals: list[Visual], placeholders: Tensor) -> None:
    prompt, column = placeholders.nonzero(as_tuple=True)
    ends = list(accumulate((len(v.features) for v in visuals), initial=0))
    if ends[-1] != len(prompt):
        raise ValueError(
            f"input_ids: expected {ends[-1]} {visuals[0].modality} placeholders, one per visual token, "
            f"got {len(prompt)}"
        )
    for visual, (start, end) in zip(visuals, pairwise(ends), strict=True):
        visual.prompt = int(prompt[start])
        if visual.prompt != int(prompt[end - 1]):
            raise ValueError(f"input_ids: expected each {visual.modality} inside one prompt, got one split over two")
        visual.columns = column[start:end]


def rebuild(outputs: dict[str, Any], visuals: list[Visual], kept: list[Tensor]) -> dict[str, Any]:
    """`mm_encoder_outputs` with the kept rows only, in the container each model's forward expects."""
    pruned = {}
    for modality, output in outputs.items():
        mine = [(v, send(k, v.features.device)) for v, k in zip(visuals, kept, strict=True) if v.modality == modality]
        pooled: Any = [v.features.index_select(0, k) for v, k in mine]
        if isinstance(output.pooler_output, Tensor):
            pooled = _stack(pooled)
        fields = {"pooler_output": pooled}
        if getattr(output, "deepstack_features", None) is not None:
            layers = range(len(output.deepstack_features))
            fields["deepstack_features"] = [[v.planes[layer].index_select(0, k) for v, k in mine] for layer in layers]
        pruned[modality] = type(output)(**fields)
    return pruned


def _stack(pooled: list[Tensor]) -> Tensor:
    """(L_i, D) pieces as one (pieces, length, D) tensor for the models that flatten it again.

    The length divides every L_i, so no piece crosses two images; beam search relies on that when it repeats them.
    """
    length = math.gcd(*(len(p) for p in pooled))
    return torch.cat(pooled).reshape(-1, length, pooled[0].shape[-1])
