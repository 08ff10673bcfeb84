"""Adapters: from the encoder's output to one `Visual` per image or video.

An adapter is called with the model, the inputs (all but the pixels on the CPU), the ids (B, S) with -1 on padding, and
`run(modality)`, which runs the model's own encoder. It returns the visuals, in the order of their placeholders, and the
encoder's output per modality. Layouts are derived from the model's own packing code, never from the values.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Encoder = Callable[[str], Any]  # runs the model's encoder of one modality; None where the inputs hold none of it
Encoded = tuple[list["Visual"], dict[str, Any]]  # the visuals, and the encoder's output per modality
Adapter = Callable[["PreTrainedModel", Mapping[str, Any], Tensor, Encoder], Encoded]
MODALITIES = ("image", "video")


@dataclass
class Visual:
    """One image or video as the language model would get it.

    features: (L, D), rows in placeholder order. planes: DeepStack features, one (L, D) per injected layer.
    tile: (L,) int64, the tile (or frame) a row belongs to. newline: (L,) bool, rows that hold the learned
    `image_newline` vector. line: (L,) int64, the line a newline row ends; -1 for rows in no line.
    prompt, columns: where its placeholders stand in the batch, set by `_place`. grids: where its tokens lie, of
    `grids.grids_of`, where a method asks.
    """

    modality: str
    features: Tensor
    tile: Tensor
    newline: Tensor
    line: Tensor
    planes: list[Tensor] = field(default_factory=list)
    prompt: int = -1
    columns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    grids: list[Any] = field(default_factory=list)


def plain(modality: str, features: Tensor, tile: Tensor | None = None, planes: list[Tensor] | None = None) -> Visual:
    length = features.shape[0]
    return Visual(
        modality,
        features,
        torch.zeros(length, dtype=torch.long) if tile is None else tile,
        torch.zeros(length, dtype=torch.bool),
        torch.full((length,), -1),
        planes or [],
    )


def _rows(output: Any) -> list[Tensor]:
    """The encoder's features as 2-D pieces: one per entry of a list or of a tensor's first dimensions."""
    pooled = output.pooler_output
    if isinstance(pooled, Tensor):
        return [pooled] if pooled.ndim == 2 else list(pooled.reshape(-1, *pooled.shape[-2:]))
    return [piece.reshape(-1, piece.shape[-1]) for piece in pooled]


def _planes(output: Any) -> list[list[Tensor]]:
    """DeepStack features, per layer one piece per entry."""
    layers = getattr(output, "deepstack_features", None)
    return [list(layer) for layer in layers] if layers is not None else []


def entries(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """One visual per entry of `pooler_output`."""
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    for modality in MODALITIES:
        out = run(modality)
        if out is None:
            continue
        layers = _planes(out)
        visuals += [plain(modality, f, planes=[layer[i] for layer in layers]) for i, f in enumerate(_rows(out))]
        outputs[modality] = out
    return visuals, outputs


def runs_of(ids: Tensor, token: int | None) -> list[int]:
    """Lengths of the unbroken runs of a placeholder, prompt by prompt."""
    # A column of zeros on both sides, so that every run of ones has a beginning and an end in its own row.
    steps = pad(torch.eq(ids, -2 if token is None else token).int(), (1, 1)).diff().flatten()
    begins, ends = (steps == 1).nonzero()[:, 0], (steps == -1).nonzero()[:, 0]
    return (ends - begins).tolist()


def pieces(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """One visual per entry of a list; of a tensor, whose rows are tiles, one per unbroken run of placeholders."""
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    for modality in MODALITIES:
        out = run(modality)
        if out is None:
            continue
        outputs[modality] = out
        rows, layers = _rows(out), _planes(out)
        if not isinstance(out.pooler_output, Tensor):
            visuals += [plain(modality, f, planes=[layer[i] for layer in layers]) for i, f in enumerate(rows)]
            continue
        flat = out.pooler_output.reshape(-1, rows[0].shape[-1])
        planes = [torch.cat([p.reshape(-1, p.shape[-1]) for p in layer]) for layer in layers]
        names = (f"{modality}_token_id", f"{modality}_token_index")
        token = next((i for i in (getattr(model.config, name, None) for name in names) if i is not None), None)
        per_tile = len(rows[0]) if out.pooler_output.ndim > 2 else len(flat)
        start = 0
        for length in runs_of(ids, token):
            part = slice(start, start + length)
            features = flat[part]
            tile = torch.arange(len(features)) // per_tile
            visuals.append(plain(modality, features, tile, [plane[part] for plane in planes]))
            start += length
        if start != len(flat):
            raise ValueError(
                f"input_ids: expected {len(flat)} {modality} placeholders, one per visual token, got {start}"
            )
    return visuals, outputs


def prompts(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """One visual per prompt, whose tiles are the unbroken runs of placeholders.

    For types whose prompts put ids of the tokenizer between the tiles of a picture: neither the encoder's output, which
    is per prompt or per tile as the version likes, nor the ids of the config tell where a picture ends.
    """
    out = run("image")
    assert out is not None
    rows = torch.cat(_rows(out))
    visuals: list[Visual] = []
    start = 0
    for own in ids:
        lengths = runs_of(own[None], model.config.image_token_id)
        tile = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        if lengths:
            visuals.append(plain("image", rows[start : start + len(tile)], tile))
        start += len(tile)
    if start != len(rows):
        raise ValueError(f"input_ids: expected {len(rows)} image placeholders, one per visual token, got {start}")
    return visuals, {"image": out}


def _packed_layout(
    model: PreTrainedModel, tiles: int, image_size: list[int], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tile, newline mask and line of every row of one any-resolution image.

    The model's packing runs on the (row, column) of each token instead of its features, so that unpadding and
    resizing are followed exactly; -1 marks newlines and -2 the base view.
    """
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    side = int(
        side * Fraction(getattr(config, "downsample_rate", None) or 1)
    )  # Granite 4's projectors shrink each tile
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
    packed = model.base_model.pack_image_features(
        [coordinates], [image_size], image_newline=torch.tensor([-1.0, -1.0]), **options
    )
    position = (packed[0] if isinstance(packed, tuple) else packed)[0]  # some return the lengths as well
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


def llava_next(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """Images as LLaVA-NeXT packs them; videos, of LLaVA-NeXT-Video, without newlines, a tile for each frame."""
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    out = run("image")
    if out is not None:
        visuals += _next_images(model, inputs, out.pooler_output)
        outputs["image"] = out
    out = run("video")
    if out is not None:
        frames = inputs["pixel_values_videos"].shape[1]
        for video in out.pooler_output:
            features = video.reshape(-1, video.shape[-1])
            visuals.append(plain("video", features, torch.arange(len(features)) // (len(features) // frames)))
        outputs["video"] = out
    return visuals, outputs


def granite4_vision(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    """Packed as LLaVA-NeXT's, once for each layer that gets features; the first layer's are those that compete."""
    out = run("image")
    assert out is not None
    layers = [packed for _, packed in out.deepstack_features]
    visuals = _next_images(model, inputs, layers[0])
    for i, visual in enumerate(visuals):
        visual.planes = [layer[i] for layer in layers]
    return visuals, {"image": out}


def _next_images(model: PreTrainedModel, inputs: Mapping[str, Any], packed: list[Tensor]) -> list[Visual]:
    strategy = inputs.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    return _packed_visuals(model, inputs, packed, [True] * len(packed), {"vision_feature_select_strategy": strategy})


def llava_onevision(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    out = run("image")
    if out is not None:
        counts = inputs.get("batch_num_images")
        # Only a prompt's single image is cut into tiles; several images get one view each.
        cropped = [True] * len(out.pooler_output) if counts is None else [n == 1 for n in counts for _ in range(n)]
        options = {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio}
        visuals += _packed_visuals(model, inputs, out.pooler_output, cropped, options)
        outputs["image"] = out
    out = run("video")
    if out is not None:
        frames = inputs["pixel_values_videos"].shape[1]
        for features in out.pooler_output:
            length = features.shape[0]
            newline = torch.zeros(length, dtype=torch.bool)
            newline[-1] = True
            tile = torch.arange(length) // ((length - 1) // frames)
            tile[-1] = 0
            visuals.append(Visual("video", features, tile, newline, torch.zeros(length, dtype=torch.long)))
        outputs["video"] = out
    return visuals, outputs


def qwen(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, run: Encoder) -> Encoded:
    visuals: list[Visual] = []
    outputs: dict[str, Any] = {}
    for modality in MODALITIES:
        out = run(modality)
        if out is None:
            continue
        layers = getattr(out, "deepstack_features", None) or []
        grids = inputs[f"{modality}_grid_thw"].tolist()
        for i, features in enumerate(out.pooler_output):
            tile = torch.arange(len(features)) // (len(features) // grids[i][0])
            visuals.append(plain(modality, features, tile, [layer[i] for layer in layers]))
        outputs[modality] = out
    return visuals, outputs
