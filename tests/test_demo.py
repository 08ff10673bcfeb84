"""The demo's picture, its counts, and the tokens it is made from."""

import contextlib
import json
import math
import os
import pathlib
import re
import struct
import sys
import warnings
import zlib

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

import numpy as np
import scipy.fft
from PIL import Image
from skimage import color
from skimage.feature import hog

import script_kernels
from script_kernels import cli, demo


def picture(path: pathlib.Path, mode: str, width: int, height: int) -> pathlib.Path:
    """A picture with a ramp, a disc and noise, in any of Pillow's modes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < min(width, height) ** 2 / 9
    grey = (120 * x / width + 100 * disc + rng.integers(0, 30, (height, width))).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "L":
        image = Image.fromarray(grey)
    else:
        rgba = np.stack([grey, 255 - grey, np.full_like(grey, 80), np.where(disc, 255, 90).astype(np.uint8)], 2)
        image = Image.fromarray(rgba).convert(mode)
    assert image.mode == mode
    image.save(path)
    return path


def number(text: str, pattern: str) -> float:
    """The number at `#` in the one printed line that fits the pattern."""
    found = re.findall(pattern.replace("#", r"(-?\d+(?:\.\d+)?|-?inf|nan)"), text, re.MULTILINE)
    assert len(found) == 1, f"{pattern}: {found} in\n{text}"
    return float(found[0])


def test_counts_add_up_and_are_what_the_ops_return(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "picture.png"
    assert cli.main(["demo", "--grid", "12", "--keep", "20", "--output", str(output)]) == 0
    said = capsys.readouterr().out

    photo = demo.load_photo(None)
    tokens = demo.describe(photo, 12)[None]
    query = tokens[:, demo.patches_in(demo.DEFAULT_BOX, photo, 12)]
    relevance = script_kernels.query_relevance(tokens, query)
    kept = script_kernels.prune(tokens, query, 20)
    mask, _ = script_kernels.gsp(tokens, 144 - 36)
    ranking, _ = script_kernels.qcsp(tokens, relevance, 40)
    top = relevance.argsort(dim=1, descending=True, stable=True)[:, :20]

    assert number(said, r"^tokens +# \(12 x 12\)") == 144
    assert number(said, r"^question .*: # patches") == query.shape[1] > 0
    assert number(said, r"^GSP +drops #,") == 36 == (~mask).sum()
    assert number(said, r"^GSP .*keeps #$") == 144 - 36 == mask.sum()
    assert number(said, r"^QCSP +ranks #,") == 40
    assert number(said, r"^QCSP .*GSP dropped #$") == (~mask.gather(1, ranking)).sum()
    assert number(said, r"^kept +#$") == 20 == kept.unique().numel()
    assert number(said, r"^overlap +# of the 20") == len(set(top[0].tolist()) & set(kept[0].tolist()))
    assert script_kernels.mask_intersect(ranking, mask, 20).equal(kept)

    # The log-dets, from the kernel written out.
    unit = torch.nn.functional.normalize(tokens[0].double(), dim=1)
    kernel = relevance[0, :, None].double() * (unit @ unit.T) * relevance[0].double()
    for pattern, index in ((r"^log-det +# +-?\d", kept[0]), (r"^log-det +-?[\d.]+ +# ", top[0])):
        assert number(said, pattern) == pytest.approx(kernel[index][:, index].logdet().item(), abs=0.006)

    for stage in ("relevance", "GSP", "QCSP", "intersection", "prune"):
        assert number(said, rf"^  {stage} +#$") > 0
    assert said.endswith(f"wrote {output}\n")
    with Image.open(output) as image:
        image.load()
        assert image.format == "PNG"
        width, height = demo.draw(photo, demo.DEFAULT_BOX, chosen(photo, 12, 20), "").get_size_inches() * demo.DPI
        assert image.size == (round(width), round(height))


def test_the_page_has_the_numbers_of_the_ops(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "demo.html"
    arguments = ["demo", "--grid", "6", "--keep", "5", "--output", str(tmp_path / "o.png"), "--html", str(page)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"wrote {page}\n")
    held = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    (one,) = held["selections"]
    photo = demo.load_photo(None)
    sets = demo.select(demo.describe(photo, 6), demo.patches_in(demo.DEFAULT_BOX, photo, 6), 5)
    assert [i for i, kept in enumerate(one["kept"]) if kept] == sets.kept[0].tolist()
    assert one["relevance"] == pytest.approx(sets.relevance[0].tolist(), abs=1e-5)
    assert [one["order"].index(i) for i in range(10)] == sets.ranking[0].tolist()
    assert [one["gain"][i] for i in sets.ranking[0].tolist()] == pytest.approx(sets.gains[0].tolist(), rel=1e-5)
    assert one["survives"] == sets.mask[0].tolist()
    assert set(held["times"]) == {"relevance", "GSP", "QCSP", "intersection", "prune"}
    with pytest.raises(SystemExit):
        cli.main([*arguments[:-1], str(tmp_path / "demo.txt")])
    assert "--html: expected a .html file in a folder that exists" in capsys.readouterr().err


def chosen(photo: np.ndarray, grid: int, keep: int) -> demo.Selection:
    return demo.select(demo.describe(photo, grid), demo.patches_in((0, 0, 40, 30), photo, grid), keep)


@pytest.mark.parametrize(
    ("mode", "width", "height"),
    [
        ("L", 90, 90),
        ("RGBA", 120, 50),
        ("RGB", 50, 120),
        ("P", 64, 48),
        ("1", 40, 40),
        ("I;16", 60, 60),
        ("LA", 41, 47),
    ],
)
def test_a_picture_of_ones_own(mode: str, width: int, height: int, tmp_path: pathlib.Path) -> None:
    path, output = picture(tmp_path / "own.png", mode, width, height), tmp_path / "out.png"
    assert cli.main(["demo", "--image", str(path), "--grid", "8", "--keep", "9", "--output", str(output)]) == 0
    with Image.open(output) as image:
        panel = min(demo.PANEL, demo.PANEL * height / width) * demo.DPI
        other = (demo.HEADER + 2 * demo.TITLE + demo.GAP + demo.FOOTER) * demo.DPI
        assert image.height == pytest.approx(2 * panel + other, abs=1)


def test_photographs_are_read_as_they_look(tmp_path: pathlib.Path) -> None:
    grey16 = demo.load_photo(picture(tmp_path / "a.png", "I;16", 30, 20))
    grey8 = demo.load_photo(picture(tmp_path / "b.png", "L", 30, 20))
    assert grey8.shape == (20, 30, 3)
    assert grey8.dtype == np.uint8
    assert np.array_equal(grey16, grey8)

    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    clear.save(tmp_path / "clear.png")
    assert (demo.load_photo(tmp_path / "clear.png") == 255).all()

    turned = Image.new("RGB", (30, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert demo.load_photo(tmp_path / "turned.png").shape == (30, 20, 3)


def test_a_descriptor_says_what_it_promises() -> None:
    tokens = demo.describe(demo.load_photo(None), 12)
    assert tokens.shape == (144, 200)
    assert tokens.dtype == torch.float32
    assert tokens.mean(0).abs().max() < 1e-6  # centred: cosines spread over both signs
    unit = torch.nn.functional.normalize(tokens, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(144, dtype=torch.bool)]
    assert cosines.quantile(0.1) < -0.2
    assert cosines.quantile(0.9) > 0.3
    for columns, weight in ((slice(0, 12), "colour"), (slice(12, 140), "orientation"), (slice(140, 200), "frequency")):
        assert tokens[:, columns].square().sum(1).mean() == pytest.approx(demo.WEIGHTS[weight] ** 2, rel=1e-4)


def test_blocks_are_those_of_the_libraries() -> None:
    """A patch's orientations and frequencies, from its 32 x 32 pixels alone, where they do not touch the edge."""
    photo = demo.load_photo(None)
    grid, at = 8, 3 * 8 + 4
    resampled = Image.fromarray(photo).resize((128, 128), Image.Resampling.LANCZOS)
    lab = color.rgb2lab(np.asarray(resampled)) / 100
    window = lab[3 * 16 - 8 : 5 * 16 - 8, 4 * 16 - 8 : 6 * 16 - 8]
    blocks = demo.blocks(lab, grid)
    spectrum = scipy.fft.dctn(window[..., 1], norm="ortho")
    expected = np.sign(spectrum[0, 1]) * np.sqrt(abs(spectrum[0, 1]))
    assert blocks["frequency"][at, 20] == pytest.approx(expected, abs=1e-9)
    inside = hog(window[..., 0], 8, (8, 8), (4, 4), block_norm="L1").reshape(4, 4, 8)
    found = np.square(blocks["orientation"][at]).reshape(4, 4, 8)
    # The window's own gradients end at its border: compare the direction that leads in the cells within.
    assert (inside.argmax(2) == found.argmax(2))[1:3, 1:3].all()
    assert found.sum() == pytest.approx(1, abs=1e-3)


def test_a_mirrored_photograph_is_described_alike() -> None:
    """Colour statistics do not depend on direction: the patch is read where it stands."""
    photo = demo.load_photo(None)
    tokens = demo.describe(photo, 8).reshape(8, 8, -1)[..., :12]
    mirrored = demo.describe(photo[:, ::-1].copy(), 8).reshape(8, 8, -1)[..., :12]
    assert torch.allclose(mirrored.flip(1), tokens, atol=1e-3)


def refuse(path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, in one line, of a picture that cannot be used."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--image", str(path), "--output", str(path.parent / "o.png")])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")
    assert not (path.parent / "o.png").exists()
    return lines[0]


@pytest.mark.parametrize("side", [8001, 14_000, 60_000])
def test_a_decompression_bomb_is_refused_unread(
    side: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG whose header promises side x side pixels; Pillow warns from 89 million on and refuses from 179 million."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "--image: expected at most 64000000 pixels, got " in refuse(path, capsys)


def test_fifos_and_devices_are_not_opened(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.png")  # nobody writes: opening it would wait for ever
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("fifo", "endless", "loop"):
        assert "--image: expected a readable picture, got " in refuse(tmp_path / f"{name}.png", capsys)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_damaged_picture_is_refused_or_drawn(kind: str, tmp_path: pathlib.Path) -> None:
    """Cut, or with bytes changed: InputError or a picture, nothing else."""
    path = tmp_path / "whole"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path, format=kind)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for turn in range(60):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole) if turn % 2 else 120, 4):
            changed[place] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(1, len(whole)) if turn % 3 == 0 else None])
        with contextlib.suppress(demo.InputError):
            assert demo.load_photo(path).ndim == 3


def test_progress_goes_to_stderr(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--grid", "4", "--keep", "4", "--output", str(tmp_path / "o.png")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("photograph")
    assert [line.split()[0] for line in err.splitlines()] == ["reading", "describing", "timing", "drawing"]


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ((0, 0, 80, 40), range(8), range(8)),
        ((0, 0, 10, 10), [0], [0, 1]),
        ((25, 12, 20, 10), [2, 3], [2, 3]),  # the centre on the right edge is outside
        ((6, 8, 2, 2), [0], [1]),  # between centres: the patch under its middle
        ((79, 39, 1, 1), [7], [7]),
    ],
)
def test_the_box_takes_the_patches_whose_centres_it_holds(box: demo.Box, columns: list[int], rows: list[int]) -> None:
    photo = np.zeros((40, 80, 3), np.uint8)
    grid = 8  # patches of 10 x 5 pixels
    inside = demo.patches_in(box, photo, grid).reshape(grid, grid)
    expected = torch.zeros(grid, grid, dtype=torch.bool)
    for row in rows:
        for column in columns:
            expected[row, column] = True
    assert inside.equal(expected)


def test_an_even_picture_is_all_the_same(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every token is zero; the ops still answer, and no set spans anything."""
    Image.new("RGB", (50, 50), (90, 120, 60)).save(tmp_path / "even.png")
    assert demo.describe(demo.load_photo(tmp_path / "even.png"), 6).abs().max() == 0
    arguments = [
        "--image",
        str(tmp_path / "even.png"),
        "--grid",
        "6",
        "--keep",
        "5",
        "--output",
        str(tmp_path / "o.png"),
    ]
    assert cli.main(["demo", *arguments]) == 0
    said = capsys.readouterr().out
    assert number(said, r"^kept +#$") == 5
    assert number(said, r"^log-det +# +-inf") == -math.inf


@pytest.mark.parametrize("keep", [1, 16])
def test_the_ends_of_keep(keep: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--grid", "4", "--keep", str(keep), "--output", str(tmp_path / "o.png")]) == 0
    said = capsys.readouterr().out
    assert number(said, r"^kept +#$") == keep
    assert number(said, rf"^overlap +# of the {keep}") in (keep, 0)


def test_prune_keeps_a_more_diverse_set_than_relevance() -> None:
    photo = demo.load_photo(None)
    both = demo.select(demo.describe(photo, 24), demo.patches_in(demo.DEFAULT_BOX, photo, 24), 64)
    assert demo.log_det(both, both.kept) > demo.log_det(both, both.by_relevance) + 5
    assert demo.nearest_cosine(both, both.kept) < demo.nearest_cosine(both, both.by_relevance) - 0.05


@pytest.mark.parametrize(("width", "height"), [(100, 100), (200, 60), (60, 200)])
def test_no_words_overlap(width: int, height: int) -> None:
    """Every piece of text stays in the figure, clear of the others and of the panels."""
    photo = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    figure = demo.draw(photo, (0, 0, 20, 20), chosen(photo, 40, 1234), "footnote")
    figure.canvas.draw()
    boxes = [words.get_window_extent() for words in figure.texts] + [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 15 + 6
    for i, one in enumerate(boxes):
        assert figure.bbox.contains(one.x0, one.y0), one
        assert figure.bbox.contains(one.x1, one.y1), one
        for other in boxes[:i]:
            assert not one.overlaps(other), (i, one, other)


def test_the_state_of_pyplot_is_left_alone(tmp_path: pathlib.Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert cli.main(["demo", "--grid", "4", "--keep", "4", "--output", str(tmp_path / "o.png")]) == 0
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_the_bright_patches_are_those_of_the_ops() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (80, 160, 3)).astype(np.uint8)
    sets = chosen(photo, 8, 10)
    figure = demo.draw(photo, (0, 0, 40, 30), sets, "")

    def bright(panel: int) -> list[int]:
        shown = np.asarray(figure.axes[panel].images[0].get_array())
        same = (shown == photo).all(2).reshape(8, 10, 8, 20).all((1, 3))
        return same.reshape(-1).nonzero()[0].tolist()

    assert bright(0) == list(range(64))
    assert bright(2) == sets.by_relevance[0].tolist()
    assert bright(3) == sets.mask[0].nonzero()[:, 0].tolist()
    assert bright(4) == sets.ranking[0].sort().values.tolist()
    assert bright(5) == sets.kept[0].tolist()
    heat = np.asarray(figure.axes[1].images[-1].get_array())
    assert np.array_equal(heat.reshape(-1), sets.relevance[0].numpy())

    for panel, marked in (
        (3, ~sets.mask[0]),
        (4, ~sets.mask[0] & torch.zeros(64).bool().scatter(0, sets.ranking[0], True)),
    ):
        x, y = figure.axes[panel].lines[0].get_data()
        cells = [int(v // 10) * 8 + int(u // 20) for u, v in zip(x, y, strict=True)]
        assert cells == marked.nonzero()[:, 0].tolist() != []
