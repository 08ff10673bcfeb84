"""Where on a picture a model's tokens lie: the grid of each tile or frame, from the inputs' sizes and the config.

A grid is claimed only where sizes that the inputs or the config tell multiply to the number of tokens, line by line as
encoders give them, and no resampler stands between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from script_kernels.selection import View, square_view

from .layouts import Visual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Types whose processors cut the middle square out of a picture, and those whose processors make it square by a border.
_MIDDLE = ("llava", "vipllava", "video_llava")
_BORDER = ("deepseek_vl", "deepseek_vl_hybrid", "janus")
# Parts of a config whose model answers with as many rows as it has queries, wherever they look.
_RESAMPLERS = ("perceiver", "resampler", "qformer", "query")


@dataclass(frozen=True)
class Grid:
    """Rows of a visual, (n,) int64, that lie line by line in a grid of `shape`; None: of which, nothing tells.

    part: what of the picture it covers, as in `View`.
    """

    name: str
    rows: Tensor
    shape: tuple[int, int] | None
    part: str | None


def grids_of(model: PreTrainedModel, visuals: list[Visual], inputs: Mapping[str, Any], processor: Any) -> list[Any]:
    """For each visual its grids, a list of `Grid` that holds each of its rows but newlines. inputs: on the CPU."""
    part = _part(model, processor)
    found = []
    for visual in visuals:
        peers = [v for v in visuals if v.modality == visual.modality]
        place = next(i for i, v in enumerate(peers) if v is visual)
        sizes = list(_sizes(model, inputs, visual.modality, place, len(peers)))
        found.append(list(_packed(visual, sizes) if visual.newline.any() else _tiled(model, visual, sizes, part)))
    return found


def view_of(grid: Grid) -> View:
    """For people: where no shape is known, a square that covers no picture."""
    if grid.shape is not None:
        return View(grid.name, grid.rows.reshape(grid.shape).numpy(), grid.part)
    view = square_view(f"{grid.name}, in the order of its tokens", len(grid.rows), None)
    padded = torch.cat([grid.rows, torch.tensor([-1])])
    return View(view.name, padded[torch.from_numpy(view.tokens)].numpy(), None)


def _part(model: PreTrainedModel, processor: Any) -> str | None:
    """What of a picture a fixed-size encoder sees, by the processor if it is known, or else by the type."""
    kind = model.config.model_type
    images = getattr(processor, "image_processor", None)
    cuts = kind in _MIDDLE and getattr(images, "do_center_crop", None) is not False
    border = kind in _BORDER or (kind in _MIDDLE and getattr(images, "do_pad", None) is True)
    return None if border else "middle" if cuts else "whole"


def _sizes(
    model: PreTrainedModel, inputs: Mapping[str, Any], modality: str, place: int, count: int
) -> Iterator[tuple[int, int]]:
    """(height, width) in any measure that the tokens' grid may divide, of one visual of `count`."""
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    patch = getattr(vision, "patch_size", None)
    for name in (f"{modality}_grid_thw", "spatial_shapes", "image_sizes"):
        sizes = inputs.get(name)
        if sizes is None or len(sizes) != count or (modality == "video" and name != "video_grid_thw"):
            continue
        height, width = (int(side) for side in sizes[place][-2:])
        if name != "image_sizes":
            yield height, width
        elif isinstance(patch, int):
            yield height // patch, width // patch
    if modality == "image" and any(name.endswith(("_thw", "_sizes", "_shapes")) for name in inputs):
        return  # pictures of any size
    side = getattr(vision, "image_size", None)
    sides = (side, side) if isinstance(side, int) else side
    patches = (patch, patch) if isinstance(patch, int) else patch
    queried = any(word in name for name in vars(config) for word in _RESAMPLERS)
    if sides and patches and len(sides) == len(patches) == 2 and not queried:
        yield sides[0] // patches[0], sides[1] // patches[1]


def _shape(count: int, sizes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Rows and columns of `count` tokens: one of the sizes, or one that a merge of m x m patches leaves of it."""
    for height, width in sizes:
        for merge in range(1, 5):
            # Rounded up, as pooling does.
            rows, cols = -(-height // merge), -(-width // merge)
            if rows * cols == count:
                return rows, cols
    return None


def _grid(name: str, rows: Tensor, sizes: list[tuple[int, int]], part: str | None) -> Grid:
    return Grid(name, rows, _shape(len(rows), sizes), part)


def _packed(visual: Visual, sizes: list[tuple[int, int]]) -> Iterator[Grid]:
    """The base view, and the crops as the one grid that their lines are."""
    content = ~visual.newline
    if visual.modality == "video":  # one newline ends all frames
        yield from _frames(visual, content, sizes)
        return
    base = (content & (visual.tile == 0)).nonzero()[:, 0]
    crops = (content & (visual.tile > 0)).nonzero()[:, 0]
    if len(base):
        side = math.isqrt(len(base))
        yield _grid("the whole picture", base, [(side, side), *sizes], "whole")
    if len(crops):
        lines = int(visual.line[crops].max()) + 1
        yield _grid("its tiles", crops, [(lines, len(crops) // lines)] if lines else [], "whole")


def _frames(visual: Visual, content: Tensor, sizes: list[tuple[int, int]]) -> Iterator[Grid]:
    for frame in visual.tile[content].unique().tolist():
        yield _grid(f"frame {frame + 1}", (content & (visual.tile == frame)).nonzero()[:, 0], sizes, "whole")


def _tiled(model: PreTrainedModel, visual: Visual, sizes: list[tuple[int, int]], part: str | None) -> Iterator[Grid]:
    tiles = visual.tile.unique().tolist()
    if visual.modality == "video":
        yield from _frames(visual, torch.ones_like(visual.newline), sizes)
        return
    for tile in tiles:
        rows = (visual.tile == tile).nonzero()[:, 0]
        # InternVL's last tile is a thumbnail of the picture; where the others lie no input tells.
        whole = len(tiles) == 1 or (model.config.model_type == "internvl" and tile == tiles[-1])
        name = "the whole picture" if whole and len(tiles) > 1 else "picture" if whole else f"tile {tile + 1}"
        yield _grid(name, rows, sizes, part if whole else None)
