"""The demo: one photograph, one question, 576 tokens pruned to 64, and a picture of what each stage did.

A patch's token is a descriptor that needs no training (`describe`), so the demo runs anywhere. It stands in for the
output of a vision encoder, which `--model` uses instead; everything that is selected is selected by the package's own
ops.
"""

import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn  # type: ignore[import-untyped]
from skimage import color, data
from skimage.feature import hog
from torch import Tensor

import script_kernels
from script_kernels.methods.dpp import script_stages
from script_kernels.selection import Selection as Shown
from script_kernels.selection import dimmed, load_picture, save_html, shrunk, square_view

Array = NDArray[Any]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels of the photograph

GSP_DROP = 0.25  # prune's defaults, named because the stages are also run one by one
OVERSAMPLE = 2.0
WARM_UP, RUNS = 5, 25

PATCH = 16  # side of a patch in the resampled photograph that the descriptor reads
NOISE = 1e-3  # standard deviations below a tenth of a Lab unit are rounding, not content
# The orders (a, b) of the DCT that are kept: 0 < a + b < 6.
LOW = np.array([(a, b) for a in range(6) for b in range(6) if 0 < a + b < 6]).T
WEIGHTS = {"colour": 1.0, "orientation": 0.5, "frequency": 0.5}

DEFAULT_PHOTO = "astronaut"
DEFAULT_CREDIT = "Photograph: Eileen Collins, NASA, shipped with scikit-image."
DEFAULT_BOX = (64, 277, 256, 150)  # the chest of the suit: much plain cloth, an emblem, a badge, a zip


class InputError(ValueError):
    """An argument that does not fit; the message names it, what was expected and what came."""


# --- from a photograph to tokens


def load_photo(path: Path | None) -> Array:
    """The photograph as (H, W, 3) uint8, upright, white where transparent. None: one that scikit-image ships."""
    if path is None:
        return np.asarray(getattr(data, DEFAULT_PHOTO)())
    try:
        return load_picture(path)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def describe(photo: Array, grid: int) -> Tensor:
    """Tokens (grid * grid, 200) float32 of a photograph (H, W, 3) uint8, row by row. No training, no weights to fetch.

    The photograph is resampled to grid x grid patches of 16 x 16 pixels, in CIE Lab. Three blocks per patch:

    - colour: mean and standard deviation of L, a, b, over the patch and over the 3 x 3 patches around it (12);
    - orientation: histograms of oriented gradients of L over the 32 x 32 pixels around it, 4 x 4 cells of 8 directions,
      normalised together, as square roots (128);
    - frequency: the low-order DCT of L, a, b over those pixels, mean left out, as signed square roots (60).

    Each column is centred over the photograph, so that a cosine compares what sets two patches apart from the rest,
    and takes both signs; then scaled to unit variance, and each block to its share in WEIGHTS. A column that does not
    vary stays 0.
    """
    side = grid * PATCH
    resampled = Image.fromarray(photo).resize((side, side), Image.Resampling.LANCZOS)
    lab = color.rgb2lab(np.asarray(resampled)) / 100
    tokens = [
        WEIGHTS[name] * _standardised(block) / math.sqrt(block.shape[1]) for name, block in blocks(lab, grid).items()
    ]
    return torch.from_numpy(np.concatenate(tokens, 1)).float()


def blocks(lab: Array, grid: int) -> dict[str, Array]:
    """The three blocks of `describe`, each (grid * grid, numbers), before they are centred and weighed."""
    near, wide, context = (_windows(lab, size) for size in (PATCH, 2 * PATCH, 3 * PATCH))
    low = dctn(wide, axes=(2, 3), norm="ortho")[:, :, LOW[0], LOW[1]].reshape(len(wide), -1)
    # Blocks of 4 x 4 cells begin at every cell: every other one is a patch's window.
    mirrored = np.pad(lab[..., 0], PATCH // 2, mode="reflect")
    directions = hog(mirrored, 8, (PATCH // 2,) * 2, (4, 4), block_norm="L1", feature_vector=False)[::2, ::2]
    return {
        "colour": np.concatenate([f(w, axis=(2, 3)) for w in (near, context) for f in (np.mean, np.std)], 1),
        "orientation": np.sqrt(directions.reshape(grid * grid, -1)),
        "frequency": np.sign(low) * np.sqrt(np.abs(low)),
    }


def _windows(image: Array, size: int) -> Array:
    """(H, W, C) -> (patches, C, size, size): a window centred on each patch, the photograph mirrored at its edges."""
    margin = (size - PATCH) // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))[::PATCH, ::PATCH]
    return windows.reshape(-1, image.shape[2], size, size)


def _standardised(columns: Array) -> Array:
    centred = columns - columns.mean(0)
    deviation = centred.std(0)
    return np.where(deviation > NOISE, centred / np.maximum(deviation, NOISE), 0.0)


def patches_in(box: Box, photo: Array, grid: int) -> Tensor:
    """(grid * grid,) bool: the patches whose centre lies in the box; if it holds none, the one under its middle."""
    x, y, w, h = box
    height, width = photo.shape[:2]
    if w < 1 or h < 1 or x < 0 or y < 0 or x + w > width or y + h > height:
        raise InputError(
            f"--box: expected x,y,w,h inside the photograph of {width} x {height} pixels, got {x},{y},{w},{h}"
        )

    def inside(start: int, length: int, extent: int) -> Array:
        centres = (np.arange(grid) + 0.5) * extent / grid
        found = (centres >= start) & (centres < start + length)
        if not found.any():
            found[int((start + length / 2) * grid / extent)] = True
        return found

    return torch.from_numpy(np.outer(inside(y, h, height), inside(x, w, width)).reshape(-1))


# --- from tokens to a choice


@dataclass(frozen=True)
class Selection:
    """What each stage made of the N tokens."""

    tokens: Tensor  # (1, N, D)
    query: Tensor  # (1, Q, D), the tokens of the patches in the box, or the words' embeddings
    relevance: Tensor  # (1, N)
    mask: Tensor  # (1, N) bool, False where GSP dropped
    redundancy: Tensor  # (1, N)
    ranking: Tensor  # (1, P), best first
    gains: Tensor  # (1, P)
    kept: Tensor  # (1, keep) ascending: the answer of prune
    by_relevance: Tensor  # (1, keep) ascending: the most relevant tokens, nothing else considered


def select(tokens: Tensor, asked: Tensor, keep: int) -> Selection:
    """Runs the stages one by one, and prune; tokens (N, D), asked (N,) bool or vectors (Q, D) in the tokens' space."""
    tokens = tokens[None]
    N = tokens.shape[1]
    if not 1 <= keep <= N:
        raise InputError(f"--keep: expected 1 to {N} (the number of patches), got {keep}")
    query = tokens[:, asked] if asked.dtype == torch.bool else asked[None]
    relevance = script_kernels.query_relevance(tokens, query)
    stages = script_stages(tokens, relevance, keep, gsp_drop=GSP_DROP, oversample=OVERSAMPLE)
    kept = script_kernels.prune(tokens, query, keep, gsp_drop=GSP_DROP, oversample=OVERSAMPLE)
    by_relevance = relevance.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values
    return Selection(
        tokens, query, relevance, stages.mask, stages.redundancy, stages.order, stages.gains, kept, by_relevance
    )


def time_stages(chosen: Selection) -> dict[str, float]:
    """Median milliseconds of each stage alone, and of prune, which runs all of them in one call."""
    N, keep = chosen.tokens.shape[1], chosen.kept.shape[1]
    stages: dict[str, Callable[[], object]] = {
        "relevance": lambda: script_kernels.query_relevance(chosen.tokens, chosen.query),
        "GSP": lambda: script_kernels.gsp(chosen.tokens, N - math.floor(GSP_DROP * N)),
        "QCSP": lambda: script_kernels.qcsp(chosen.tokens, chosen.relevance, chosen.ranking.shape[1]),
        "intersection": lambda: script_kernels.mask_intersect(chosen.ranking, chosen.mask, keep),
        "prune": lambda: script_kernels.prune(
            chosen.tokens, chosen.query, keep, gsp_drop=GSP_DROP, oversample=OVERSAMPLE
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in stages}
    # In turns, so that a busy machine does not fall on one stage alone; the first rounds only warm up.
    for turn in range(WARM_UP + RUNS):
        for name, stage in stages.items():
            start = time.perf_counter()
            stage()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def log_det(chosen: Selection, indices: Tensor) -> float:
    """log det of L = diag(r) S diag(r) on a set, in float64: what QCSP makes large. -inf: linearly dependent tokens."""
    rows = chosen.tokens[0, indices[0]].double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300) * chosen.relevance[0, indices[0], None].double()
    variances = torch.linalg.eigvalsh(rows @ rows.T)
    return float(variances.log().sum()) if variances[0] > 1e-12 * variances[-1] else -math.inf


def nearest_cosine(chosen: Selection, indices: Tensor) -> float:
    """Mean over a set of the cosine with the most similar other member: 1 for copies, NaN for a single token."""
    rows = chosen.tokens[0, indices[0]].double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    cosines = (rows @ rows.T).fill_diagonal_(-math.inf)
    return float(cosines.amax(1).mean()) if len(rows) > 1 else math.nan


def report(photo: Array, question: str, chosen: Selection, times: dict[str, float]) -> str:
    """The counts and times as lines of text."""
    N, keep, pool = chosen.tokens.shape[1], chosen.kept.shape[1], chosen.ranking.shape[1]
    grid = math.isqrt(N)
    shared = int(torch.isin(chosen.kept, chosen.by_relevance).sum())
    struck = int((~chosen.mask[0, chosen.ranking[0]]).sum())
    sets = (chosen.kept, chosen.by_relevance)
    lines = [
        f"photograph   {photo.shape[1]} x {photo.shape[0]} pixels",
        f"question     {question}",
        f"tokens       {N} ({grid} x {grid}) of {chosen.tokens.shape[2]} numbers",
        f"GSP          drops {int((~chosen.mask).sum())}, keeps {int(chosen.mask.sum())}",
        f"QCSP         ranks {pool}, of which GSP dropped {struck}",
        f"kept         {keep}",
        f"overlap      {shared} of the {keep} are among the {keep} most relevant",
        "",
        "                  prune   relevance alone",
        "log-det        {:8.2f}   {:15.2f}   of diag(r) S diag(r); larger is better".format(
            *(log_det(chosen, s) for s in sets)
        ),
        "nearest cosine {:8.3f}   {:15.3f}   to the most similar other kept token, mean; smaller is better".format(
            *(nearest_cosine(chosen, s) for s in sets)
        ),
        "relevance      {:8.3f}   {:15.3f}   mean, 0 to 1".format(
            *(float(chosen.relevance[0, s[0]].mean()) for s in sets)
        ),
        "",
        f"milliseconds, median of {RUNS} runs ({chosen.tokens.device}, threads: {torch.get_num_threads()})",
    ]
    return "\n".join(lines + [f"  {name:<13}{value:9.3f}" for name, value in times.items()])


# --- the page and the picture


def for_page(chosen: Selection) -> Shown:
    """The same as a page shows it."""
    N = chosen.tokens.shape[1]
    ranking = chosen.ranking[0].numpy()
    order, gain = np.full(N, -1), np.full(N, np.nan)
    order[ranking], gain[ranking] = np.arange(len(ranking)), chosen.gains[0].numpy()
    arrays = {"relevance": chosen.relevance, "survives": chosen.mask, "redundancy": chosen.redundancy}
    found = {name: values[0].numpy() for name, values in arrays.items()}
    return Shown("photograph", chosen.kept[0].numpy(), (square_view("patches", N),), N, order=order, gain=gain, **found)


DPI = 100
PANEL = 4.0  # inches; the longer side of a panel
MARGIN, GAP, HEADER, TITLE, FOOTER = 0.36, 0.26, 0.94, 0.6, 0.54
INK, MUTED, ACCENT = "#1a1c1f", "#62676e", "#12b5e5"


def draw(photo: Array, box: Box | None, chosen: Selection, footnote: str, words: str = "") -> Figure:
    """Six panels: above, the question (a box, or words) and what relevance alone would keep; below, prune's stages."""
    N, keep, pool = chosen.tokens.shape[1], chosen.kept.shape[1], chosen.ranking.shape[1]
    grid = math.isqrt(N)
    dropped = ~chosen.mask[0]
    in_pool, kept, by_relevance = (
        torch.zeros(N, dtype=torch.bool).scatter(0, index[0], True)
        for index in (chosen.ranking, chosen.kept, chosen.by_relevance)
    )
    struck = in_pool & dropped
    shared = int((kept & by_relevance).sum())
    everything = torch.ones(N, dtype=torch.bool)

    shown = shrunk(photo, 1024)
    ratio = photo.shape[0] / photo.shape[1]
    width, height = PANEL * min(1.0, 1 / ratio), PANEL * min(1.0, ratio)
    row = TITLE + height
    cross = 0.4 * 72 * min(width, height) / grid
    figure = Figure((2 * MARGIN + 3 * PANEL + 2 * GAP, HEADER + 2 * row + GAP + FOOTER), dpi=DPI, facecolor="white")
    total_width, total_height = figure.get_size_inches()

    def text(x: float, y: float, words: str, size: float, **style: Any) -> None:
        """x, y in inches from the upper left corner, y of the baseline."""
        figure.text(x / total_width, 1 - y / total_height, words, fontsize=size, va="baseline", **style)

    def panel(index: int, bright: Tensor, title: str, note: str) -> Axes:
        left = MARGIN + (index % 3) * (PANEL + GAP)
        top = HEADER + (index // 3) * (row + GAP)
        text(left, top + 0.2, title, 12, weight="bold", color=INK)
        text(left, top + 0.44, note, 10, color=MUTED)
        lower = total_height - top - row
        axes = figure.add_axes((left / total_width, lower / total_height, width / total_width, height / total_height))
        axes.imshow(
            dimmed(shown, bright.reshape(grid, grid).numpy()),
            extent=(0, photo.shape[1], photo.shape[0], 0),
            aspect="auto",
        )
        axes.set_axis_off()
        if box is not None:
            axes.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor="white", linewidth=3.2))
            axes.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=ACCENT, linewidth=1.8))
        return axes

    text(MARGIN, 0.46, f"Which {keep} of {N} visual tokens should a language model see?", 19, weight="bold", color=INK)
    text(MARGIN, 0.76, "Above: the question, and relevance alone. Below: the three stages of prune.", 11.5, color=MUTED)
    text(MARGIN, total_height - 0.24, footnote, 9, color=MUTED)
    asked = chosen.query.shape[1]
    if box is None:
        panel(
            0, everything, f'"{textwrap.shorten(words, 36, placeholder=" ...")}"', f"{N} patches, {asked} text tokens"
        )
    else:
        panel(0, everything, "The question: the boxed region", f"{N} patches, {asked} of them in the box")
    against = "the text's tokens" if box is None else "the box's patches"
    heat = panel(1, everything, "Relevance to the question", f"cosine with {against}: dark 0, bright 1")
    heat.imshow(
        chosen.relevance[0].reshape(grid, grid).numpy(),
        cmap="magma",
        vmin=0,
        vmax=1,
        extent=(0, photo.shape[1], photo.shape[0], 0),
        aspect="auto",
        interpolation="nearest",
    )
    panel(
        2,
        by_relevance,
        f"Relevance alone: the top {keep}",
        f"nearest kept patch: mean cosine {nearest_cosine(chosen, chosen.by_relevance):.2f}",
    )
    gsp = panel(3, ~dropped, f"1  GSP drops {int(dropped.sum())} redundant patches", "for each, a similar patch stays")
    _mark(gsp, dropped, photo, grid, cross)
    qcsp = panel(
        4,
        in_pool,
        f"2  QCSP ranks {pool}: relevant and diverse",
        f"crossed: {int(struck.sum())} that GSP dropped",
    )
    _mark(qcsp, struck, photo, grid, cross)
    panel(
        5,
        kept,
        f"3  prune keeps {keep}: relevant, few alike",
        f"nearest kept patch: mean cosine {nearest_cosine(chosen, chosen.kept):.2f}; {shared} in common",
    )
    return figure


def _mark(axes: Axes, marked: Tensor, photo: Array, grid: int, size: float) -> None:
    """A cross of that size in points on each marked patch."""
    cell_width, cell_height = photo.shape[1] / grid, photo.shape[0] / grid
    rows, columns = marked.reshape(grid, grid).numpy().nonzero()
    axes.set_autoscale_on(False)
    axes.plot(
        (columns + 0.5) * cell_width,
        (rows + 0.5) * cell_height,
        linestyle="none",
        marker="x",
        markersize=size,
        markeredgewidth=1.1,
        color="white",
    )


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of 256 dithered colours, half as large as one of full depth."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
    reduced = image.quantize(256, palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    colours = np.reshape(reduced.getpalette() or [], (-1, 3))
    colours[(colours >= 250).all(1)] = 255  # the page stays white
    reduced.putpalette(colours.ravel().tolist())
    reduced.save(path, optimize=True)


def run(
    image: Path | None,
    box: Box | None,
    keep: int,
    grid: int,
    output: Path,
    model: str | None = None,
    words: str = "",
    page: Path | None = None,
) -> None:
    """The command `script-kernels demo`: prints counts and times, writes one PNG, and the page if it is asked for.

    Raises InputError before any work.

    With `model`, tokens and question are that model's visual features and the embeddings of `words`; box and grid are
    not used, and the picture shows the photograph's middle square, which the model sees.
    """
    if not 2 <= grid <= 96:
        raise InputError(f"--grid: expected 2 to 96 patches a side, got {grid}")
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise InputError(f"--output: expected a .png file in a folder that exists, got {output}")
    if page is not None and (page.suffix.lower() != ".html" or not page.parent.is_dir()):
        raise InputError(f"--html: expected a .html file in a folder that exists, got {page}")
    _progress("reading the photograph ...")
    photo = load_photo(image)
    credit = DEFAULT_CREDIT if image is None else ""
    if model is not None:
        _progress("loading the model and its features ...")
        photo, tokens, query = _model_features(model, photo, words)
        chosen, box = select(tokens, query, keep), None
        question = f'"{words}": {chosen.query.shape[1]} text tokens'
        footnote = f"Tokens: visual features of {textwrap.shorten(model, 60, placeholder='...')}. "
    else:
        if box is None:
            height, width = photo.shape[:2]
            # For a photograph we do not know, its middle.
            middle = (width // 3, height // 3, max(width // 3, 1), max(height // 3, 1))
            box = DEFAULT_BOX if image is None else middle
        _progress(f"describing and pruning {grid * grid} patches ...")
        chosen = select(describe(photo, grid), patches_in(box, photo, grid), keep)
        question = f"box {','.join(map(str, box))}: {chosen.query.shape[1]} patches"
        footnote = "Tokens: patch descriptors of colour, orientation and frequency, no training. "
    _progress(f"timing the stages, {RUNS} runs each ...")
    times = time_stages(chosen)
    print(report(photo, question, chosen, times))
    _progress("drawing ...")
    save(draw(photo, box, chosen, footnote + credit, words), output)
    print(f"\nwrote {output}")
    if page is not None:
        save_html(page, [for_page(chosen)], [photo], title=f"Which patches stay: {question}", milliseconds=times)
        print(f"wrote {page}")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _model_features(model: str, photo: Array, words: str) -> tuple[Array, Tensor, Tensor]:
    """The part of the photograph that the model sees, its tokens (N, D) and the words' embeddings (Q, D)."""
    from script_kernels.transformers.demo import demo_features

    try:
        features = demo_features(model, Image.fromarray(photo), words)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        message = "transformers is not installed: pip install 'transformers>=5.18'"
        raise InputError(f"--model: {message}") from None
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"--model: {error}") from None
    return np.asarray(features.picture), features.tokens, features.query
