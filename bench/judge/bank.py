"""The pictures that scenes are composed of, rendered from what packages ship, and kept in `bank.npz`.

    python -m bench.judge.bank            # rebuilds bank.npz and prints its digest

Letters from fonts (matplotlib's and the `font-*` packages), handwritten digits from scikit-learn, photographs from
scikit-image. Each kind is split by its source, so that a test scene shows fonts, handwriting and photographs that no
training scene shows. The bank is committed: fonts render differently from one FreeType to the next, and scenes have to
come out bit for bit alike everywhere, from NumPy alone.
"""

import hashlib
import pathlib
from typing import Any

import numpy as np

PATH = pathlib.Path(__file__).with_name("bank.npz")
LETTERS = "ABEFHKLMPRSTUXYZ"
TILE = 16  # pixels
VARIANTS = 8  # drawings of a letter in one font: sizes and angles
SPLITS = ("train", "val", "test")

FONTS = {
    "train": (
        "matplotlib/mpl-data/fonts/ttf/DejaVuSans-Bold.ttf",
        "matplotlib/mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf",
        "matplotlib/mpl-data/fonts/ttf/STIXGeneralBol.ttf",
        "matplotlib/mpl-data/fonts/ttf/cmb10.ttf",
        "font_roboto/files/Roboto-Bold.ttf",
        "font_roboto/files/Roboto-Medium.ttf",
        "font_source_sans_pro/files/SourceSansPro-Bold.ttf",
        "font_source_sans_pro/files/SourceSansPro-Semibold.ttf",
        "font_source_serif_pro/files/SourceSerifPro-Bold.otf",
        "font_caladea/files/Caladea-Regular.ttf",
        "font_manrope/files/Manrope-Bold.ttf",
        "font_manrope/files/Manrope-Medium.ttf",
    ),
    "val": ("matplotlib/mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf", "font_fredoka_one/files/FredokaOne-Regular.ttf"),
    "test": (
        "font_caladea/files/Caladea-Bold.ttf",
        "font_hanken_grotesk/files/HankenGrotesk-Bold.otf",
        "font_hanken_grotesk/files/HankenGrotesk-Medium.otf",
        "matplotlib/mpl-data/fonts/ttf/cmss10.ttf",
    ),
}
PHOTOS = {
    "train": ("coffee.png", "chelsea.png", "rocket.jpg", "moon.png", "brick.png", "gravel.png"),
    "val": ("camera.png",),
    "test": ("astronaut.png", "hubble_deep_field.jpg", "grass.png"),
}
PHOTO = 128  # pixels, a side


def _letters(font: pathlib.Path, rng: np.random.Generator) -> Any:
    """(letters, VARIANTS, TILE, TILE) uint8: how much ink lies on each pixel."""
    from PIL import Image, ImageDraw, ImageFont

    big = 4 * TILE
    drawn = np.zeros((len(LETTERS), VARIANTS, TILE, TILE), np.uint8)
    for n, letter in enumerate(LETTERS):
        for v in range(VARIANTS):
            image = Image.new("L", (big, big))
            face = ImageFont.truetype(str(font), int(rng.integers(44, 60)))
            ImageDraw.Draw(image).text((big // 2, big // 2), letter, fill=255, font=face, anchor="mm")
            image = image.rotate(float(rng.uniform(-12, 12)), resample=Image.Resampling.BICUBIC)
            drawn[n, v] = np.asarray(image.resize((TILE, TILE), Image.Resampling.BOX))
    return drawn


def build() -> dict[str, Any]:
    """Renders the bank from the installed packages."""
    import site

    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(15)
    packages = pathlib.Path(site.getsitepackages()[0])
    digits = load_digits()
    ink = (digits.images * (255 / 16)).astype(np.uint8)
    # The data set goes writer by writer, so a split by position shows the test other hands.
    cuts = {"train": slice(0, 1200), "val": slice(1200, 1400), "test": slice(1400, None)}
    bank: dict[str, Any] = {}
    for split in SPLITS:
        bank[f"letters_{split}"] = np.stack([_letters(packages / font, rng) for font in FONTS[split]])
        some = [np.asarray(Image.fromarray(d).resize((13, 13), Image.Resampling.BICUBIC)) for d in ink[cuts[split]]]
        bank[f"digits_{split}"] = np.stack(some)
        bank[f"values_{split}"] = digits.target[cuts[split]].astype(np.uint8)
        photos = []
        for name in PHOTOS[split]:
            image = Image.open(pathlib.Path(data.__file__).parent / name).convert("RGB")
            side = min(image.size)
            image = image.crop((0, 0, side, side)).resize((PHOTO, PHOTO), Image.Resampling.BOX)
            photos.append(np.asarray(image))
        bank[f"photos_{split}"] = np.stack(photos)
    return bank


def digest(bank: Any) -> str:
    """SHA-256 of all arrays, by name."""
    total = hashlib.sha256()
    for name in sorted(bank):
        total.update(name.encode() + np.ascontiguousarray(bank[name]).tobytes())
    return total.hexdigest()


def load() -> dict[str, Any]:
    """The committed bank."""
    with np.load(PATH) as stored:
        return {name: stored[name] for name in stored.files}


if __name__ == "__main__":
    rendered = build()
    np.savez_compressed(PATH, **rendered)
    print(f"{PATH.name}: {PATH.stat().st_size / 2**20:.2f} MiB, sha256 {digest(rendered)}")
