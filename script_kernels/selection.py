"""What pruning made of a picture's tokens, drawn over the picture: as a figure, or as a page that answers the pointer.

Plain arrays, without torch or transformers: `script_kernels.transformers.explain` and the demo fill in a `Selection`.
Drawing needs Pillow, and the figure matplotlib.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
MOST_PIXELS = 64_000_000  # a larger picture says less per pixel than its memory costs: 4 bytes each, several times
SHOWN = 1024  # the longer side of an only picture in a page or figure, in pixels; frames of a video share it
INK, MUTED = "#1a1c1f", "#62676e"


@dataclass(frozen=True)
class View:
    """Tokens that lie on a grid: a picture's, a tile's, a frame's.

    tokens: (rows, cols) int, which of the selection's tokens lies in each cell; -1: none. part: what of the picture the
    grid covers: "whole", "middle" (the square in its middle), or None where that is not known, as for a tile whose
    place no input tells.
    """

    name: str
    tokens: Array
    part: str | None = "whole"

    def lay(self, values: Array) -> Array:
        """(rows, cols) float64 of (L,) values, NaN in cells without a token."""
        laid = np.asarray(values, np.float64)[np.maximum(self.tokens, 0)]
        return np.where(self.tokens >= 0, laid, np.nan)


@dataclass(frozen=True)
class Selection:
    """What each stage made of the L tokens of one image or video. A stage that did not run is None.

    kept: (K,) ascending, the tokens that stay. relevance: (L,) in [0, 1], NaN for tokens that do not compete. taken:
    (L,) bool, what "focus" keeps by relevance, and as typical, before GSP and QCSP choose the rest. survives: (L,)
    bool, False where GSP dropped. redundancy: (L,) as GSP returns it. order: (L,) int, a token's place in QCSP's
    ranking (0 is first), -1 if it is not ranked. gain: (L,) of QCSP's picks, NaN likewise. GSP and QCSP count within
    what shares a budget: the image, the tile, or the request.
    """

    name: str
    kept: Array
    views: tuple[View, ...]
    length: int
    relevance: Array | None = None
    taken: Array | None = None
    survives: Array | None = None
    redundancy: Array | None = None
    order: Array | None = None
    gain: Array | None = None
    stays: Array = field(init=False)  # (L,) bool

    def __post_init__(self) -> None:
        stays = np.zeros(self.length, bool)
        stays[np.asarray(self.kept, np.int64)] = True
        object.__setattr__(self, "stays", stays)
        for name in ("relevance", "taken", "survives", "redundancy", "order", "gain"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != (self.length,):
                raise ValueError(f"{name}: expected shape ({self.length},), got {np.shape(value)}")
        for view in self.views:
            if view.tokens.ndim != 2 or view.tokens.size == 0 or view.tokens.max() >= self.length:
                raise ValueError(
                    f"views: expected cells that hold -1 to {self.length - 1}, got others in {view.name!r}"
                )


def square_view(name: str, length: int, part: str | None = "whole") -> View:
    """Tokens line by line in the smallest square that holds them."""
    cols = max(1, math.isqrt(max(length, 1) - 1) + 1)
    rows = max(1, -(-length // cols))
    cells = np.full(rows * cols, -1)
    cells[:length] = np.arange(length)
    return View(name, cells.reshape(rows, cols), part)


# --- pictures


def load_picture(image: Any) -> Array:
    """A picture as (H, W, 3) uint8, upright, white where transparent.

    image: a path, a Pillow image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8 or of floats in [0, 1].

    Raises:
        ValueError: no picture, a damaged one, or more than 64 million pixels; the message begins with "image: ".
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = image if isinstance(image, (str, os.PathLike)) else type(image).__name__
    try:
        if isinstance(image, (str, os.PathLike)):
            path = Path(image)
            # A FIFO would wait for its writer, and a device need not end: only files are opened.
            if path.exists() and not path.is_file():
                raise OSError("not a file")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is lower
                with Image.open(path) as file:
                    return _rgb(ImageOps.exif_transpose(_small(file, f" in {path}")))
        if isinstance(image, Image.Image):
            return _rgb(ImageOps.exif_transpose(_small(image)))
        return _rgb(_small(Image.fromarray(_bytes(np.asarray(image)))))
    except UnidentifiedImageError:
        raise ValueError(f"image: expected a picture that Pillow reads, got {name}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"image: expected at most {MOST_PIXELS} pixels, got more in {name}") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's decoders raise all three over broken files
        if str(error).startswith("image: "):
            raise
        raise ValueError(f"image: expected a readable picture, got {name} ({error})") from None


def _small(image: Any, where: str = "") -> Any:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"image: expected at most {MOST_PIXELS} pixels, got {image.width} x {image.height}{where}")
    if image.width * image.height == 0:
        raise ValueError(f"image: expected pixels, got {image.width} x {image.height}{where}")
    return image


def _bytes(values: Array) -> Array:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(f"image: expected shape (H, W), (H, W, 3) or (H, W, 4), got {values.shape}")
    if np.issubdtype(values.dtype, np.floating):
        return (np.nan_to_num(values).clip(0, 1) * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 or floats in [0, 1], got {values.dtype}")
    return values


def _rgb(image: Any) -> Array:
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow clips 16-bit greys where it should scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def pictures_of(selection: Selection, image: Any) -> list[Array | None]:
    """The picture behind each view, shrunk: one for all, or of a list (a video's frames) one for each."""
    views = len(selection.views)
    if image is None:
        return [None] * views
    several = isinstance(image, (list, tuple))
    if several and len(image) != views:
        raise ValueError(f"image: expected one picture, or {views}, one for each view, got {len(image)}")
    side = max(192, int(SHOWN / math.sqrt(views))) if several else SHOWN
    shown = [shrunk(load_picture(one), side) for one in (image if several else [image])]
    parts = [view.part for view in selection.views]
    return [None if p is None else _part(shown[i if several else 0], p) for i, p in enumerate(parts)]


def shrunk(picture: Array, side: int) -> Array:
    """The picture with its longer side at most `side` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _part(picture: Array, part: str) -> Array:
    if part == "whole":
        return picture
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def dimmed(picture: Array, bright: Array) -> Array:
    """The picture (H, W, 3) with all but the bright cells of a grid (rows, cols) greyed and darkened."""
    rows = np.arange(picture.shape[0]) * bright.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * bright.shape[1] // picture.shape[1]
    lit = bright[np.ix_(rows, columns)]
    grey = picture.mean(2, keepdims=True) * 0.28 + 14
    return np.where(lit[:, :, None], picture, grey).astype(np.uint8)


# --- a figure


def plot_selection(selection: Selection, image: Any = None, *, most_views: int = 4) -> Figure:
    """Panels over the picture: what is kept, and what each stage that ran found; a line of them for each view.

    Args:
        selection: of `script_kernels.transformers.explain`.
        image: the picture as `load_picture` takes it, a list of one for each view (a video's frames), or None.
        most_views: lines at most; the title says how many there are.

    Returns:
        A matplotlib `Figure`, drawn without pyplot: `figure.savefig("kept.png")`.

    Raises:
        ValueError: a picture that cannot be read, or as many as there are neither one nor views.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    behind = pictures_of(selection, image)
    panels = _panels(selection)
    lines = min(len(selection.views), max(1, most_views))
    figure = Figure((3.3 * len(panels) + 0.2, 3.4 * lines + 0.9), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    more = f", the first {lines} of {len(selection.views)} views" if lines < len(selection.views) else ""
    title = f"{selection.name}: {len(selection.kept)} of {selection.length} tokens kept{more}"
    # A dollar sign would begin a formula.
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, weight="bold", color=INK, parse_math=False)
    axes = figure.subplots(lines, len(panels), squeeze=False)
    for view, picture, row in zip(selection.views, behind, axes, strict=False):
        rows, cols = view.tokens.shape
        extent = (0, cols, rows, 0)
        ground = np.full((rows, cols, 3), 200, np.uint8) if picture is None else picture
        shape = ground.shape[0] / ground.shape[1]
        for axis, (name, values, kind) in zip(row, panels, strict=True):
            laid = view.lay(values)
            lit = laid > 0 if kind == "set" else np.isfinite(laid)
            axis.imshow(dimmed(ground, lit), extent=extent, aspect="auto")
            if kind == "heat":
                axis.imshow(np.ma.masked_invalid(laid), extent=extent, aspect="auto", alpha=0.75, **_scale(name))
            axis.set_box_aspect(shape if picture is not None else rows / cols)
            axis.set_axis_off()
            axis.set_title(f"{name}\n{view.name}", fontsize=10, color=INK, parse_math=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.95 / figure.get_size_inches()[1], 0.05, 0.25)
    return figure


def _scale(name: str) -> dict[str, Any]:
    if name == "QCSP's order":
        return {"cmap": "viridis_r"}
    return {"cmap": "magma"} | ({"vmin": 0, "vmax": 1} if name == "relevance" else {})


def _panels(selection: Selection) -> list[tuple[str, Array, str]]:
    """(name, (L,) values, "set" or "heat") of what there is to see."""
    panels: list[tuple[str, Array, str]] = [("kept", selection.stays, "set")]
    if selection.relevance is not None:
        panels.append(("relevance", selection.relevance, "heat"))
    if selection.taken is not None:
        panels.append(("taken by relevance", selection.taken, "set"))
    if selection.survives is not None:
        panels.append(("left by GSP", selection.survives, "set"))
    if selection.order is not None:
        panels.append(("QCSP's order", np.where(selection.order < 0, np.nan, selection.order), "heat"))
    return panels


# --- a page


def save_html(
    path: str | os.PathLike[str],
    selections: Sequence[Selection],
    images: Sequence[Any] | None = None,
    *,
    title: str = "Which visual tokens stay",
    milliseconds: Mapping[str, float] | None = None,
) -> None:
    """Writes one HTML file that needs nothing else: point at a patch for its numbers, switch between the stages.

    Args:
        path: the file.
        selections: one for each image or video, as `explain(...).images` has them.
        images: for each what `plot_selection` takes; None: grids without a picture.
        title: the heading.
        milliseconds: of each stage, shown below the heading.

    Raises:
        ValueError: as many pictures as there are no selections, or one that cannot be read. Nothing is written then.
    """
    from .page import build

    if images is None:
        images = [None] * len(selections)
    if len(images) != len(selections):
        raise ValueError(f"images: expected {len(selections)}, one for each selection, got {len(images)}")
    behind = [pictures_of(s, i) for s, i in zip(selections, images, strict=True)]
    # Encoded first: half a surrogate in a title must not leave an empty file.
    Path(path).write_bytes(build(selections, behind, title, milliseconds or {}).encode("utf-8", "replace"))
