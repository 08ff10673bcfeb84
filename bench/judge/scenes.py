"""Scenes, their questions, answers and evidence: composed from the bank by NumPy's generator, bit for bit.

A scene is a photograph with coloured tiles of 4 x 4 patches on it, each with a letter, some of them side by side, and a
sheet of 4 x 8 patches with a handwritten number of two digits. A patch is 4 x 4 pixels; a scene of 24 x 24 patches
gives 576 visual tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import bank as bank_module
from .bank import LETTERS, TILE

PATCH = 4
GRID = 24
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 70, 205),
    "yellow": (225, 205, 50),
    "purple": (150, 50, 170),
    "orange": (240, 130, 30),
}
COLOUR_NAMES = tuple(COLOURS)
QUADRANTS = ("topleft", "topright", "bottomleft", "bottomright")
NUMBERS = ("one", "two", "three", "four")
TEMPLATES = {
    "colour": "what colour is {a}",
    "where": "where is the {a}",
    "count": "how many tiles {a}",
    "right": "what right of {a}",
    "left": "what left of {a}",
    "exists": "is there a {a}",
    "number": "what is the number",
    "letter": "which letter on {a}",
    "before": "is {a} before {b}",
}
KINDS = tuple(TEMPLATES)
WORDS = (
    "<pad>",
    *LETTERS,
    *COLOUR_NAMES,
    *"0123456789",
    *QUADRANTS,
    *NUMBERS,
    "yes",
    "no",
    *sorted({w for t in TEMPLATES.values() for w in t.split() if "{" not in w}),
)
WORD = {word: i for i, word in enumerate(WORDS)}
LENGTH = 5  # words of a question with its answer's first word: only a number's second digit is predicted from one
THINGS = 1 + len(LETTERS) + 10  # what a token may lie on: nothing, a letter, a digit


@dataclass
class Question:
    """One question: word ids, where answers are predicted and which, and the patches that decide it."""

    kind: str
    words: list[int]  # LENGTH ids, padded with 0
    answers: list[int]  # LENGTH ids: what follows each word, 0 where nothing is asked
    evidence: list[int]  # token indices, ascending


@dataclass
class Scene:
    """An image (H, W, 3) uint8, the labels of its tokens and what can be asked about it."""

    image: Any
    things: Any  # (tokens,) int64: 0 nothing, then letters, then digits
    colours: Any  # (tokens,) int64: 0 none, then COLOUR_NAMES
    origin: tuple[int, int]  # of the image in the canvas of GRID x GRID patches: row, column
    questions: list[Question]


def ask(kind: str, answer: list[str], evidence: Any, a: str = "", b: str = "") -> Question:
    words = [WORD[w] for w in TEMPLATES[kind].format(a=a, b=b).split()]
    ids = [WORD[w] for w in answer]
    answers = [0] * (len(words) - 1) + ids
    words = words + ids[:-1]
    fill = LENGTH - len(words)
    return Question(kind, words + [0] * fill, answers + [0] * fill, sorted(evidence))


class Composer:
    """Composes scenes of one split of the bank."""

    def __init__(self, split: str, bank: dict[str, Any] | None = None) -> None:
        bank = bank_module.load() if bank is None else bank
        self.letters = bank[f"letters_{split}"]
        self.digits = bank[f"digits_{split}"]
        self.values = bank[f"values_{split}"]
        self.photos = bank[f"photos_{split}"]

    def scene(self, rng: np.random.Generator, grid: int = GRID) -> Scene:
        """A scene of grid x grid patches; a small one lies somewhere in the canvas of GRID x GRID."""
        side = grid * PATCH
        photo = self.photos[rng.integers(len(self.photos))]
        y, x = rng.integers(photo.shape[0] - side + 1, size=2)
        image = photo[y : y + side, x : x + side].astype(np.float32)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        image = image * np.float32(rng.uniform(0.45, 0.75)) + np.float32(rng.uniform(20, 60))
        image = image + rng.integers(-8, 9, size=image.shape).astype(np.float32)
        things = np.zeros((grid, grid), np.int64)
        colours = np.zeros((grid, grid), np.int64)
        taken = np.zeros((grid + 2, grid + 2), bool)
        origin = (int(rng.integers(GRID - grid + 1)), int(rng.integers(GRID - grid + 1)))

        def place(width: int) -> tuple[int, int] | None:
            for _ in range(30):
                row, column = int(rng.integers(grid - 3)), int(rng.integers(grid - width + 1))
                # One patch of room on every side, so that only what belongs together touches.
                if not taken[row : row + 6, column : column + width + 2].any():
                    taken[row + 1 : row + 5, column + 1 : column + 1 + width] = True
                    return row, column
            return None

        small = ([2, 1], [2, 0], [0, 1, 1], [2, 1, 1])
        plan = {GRID: [2, 2, 0, 1, 1, 1], 16: [2, 2, 0, 1]}.get(grid) or small[rng.integers(len(small))]
        letters = rng.permutation(len(LETTERS))
        few = rng.permutation(len(COLOUR_NAMES))[:4] if rng.random() < 0.7 else np.arange(len(COLOUR_NAMES))
        tiles: list[tuple[int, int, int, int]] = []  # letter, colour, row, column
        pairs: list[tuple[int, int]] = []
        number: tuple[list[int], int, int] | None = None
        for what in plan:
            spot = place(4 if what == 1 else 8)
            if spot is None:
                continue
            row, column = spot
            if what == 0:
                number = (self._sheet(rng, image, things, row, column), row, column)
                continue
            if what == 2:
                pairs.append((len(tiles), len(tiles) + 1))
            for n in range(what):
                letter, colour = int(letters[len(tiles)]), int(few[rng.integers(len(few))])
                self._tile(rng, image, letter, colour, row, column + 4 * n)
                things[row : row + 4, column + 4 * n : column + 4 * n + 4] = 1 + letter
                colours[row : row + 4, column + 4 * n : column + 4 * n + 4] = 1 + colour
                tiles.append((letter, colour, row, column + 4 * n))
        image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        absent = [int(n) for n in letters[len(tiles) :]]
        questions = self._questions(rng, grid, origin, tiles, pairs, number, absent)
        return Scene(image, things.reshape(-1), colours.reshape(-1), origin, questions)

    def mosaic(self, rng: np.random.Generator, grid: int) -> Scene:
        """Nothing but tiles and digits, for the tower to look at, and no questions."""
        origin = (int(rng.integers(GRID - grid + 1)), int(rng.integers(GRID - grid + 1)))
        image = np.empty((grid * PATCH, grid * PATCH, 3), np.float32)
        things = np.zeros((grid, grid), np.int64)
        colours = np.zeros((grid, grid), np.int64)
        for row in range(0, grid, 4):
            for column in range(0, grid, 4):
                at = slice(row, row + 4), slice(column, column + 4)
                if rng.random() < 0.25:
                    self._digit(rng, image, things, row, column, np.float32(rng.uniform(215, 245)))
                    continue
                letter, colour = int(rng.integers(len(LETTERS))), int(rng.integers(len(COLOUR_NAMES)))
                self._tile(rng, image, letter, colour, row, column)
                things[at], colours[at] = 1 + letter, 1 + colour
        return Scene(
            np.clip(np.rint(image), 0, 255).astype(np.uint8), things.reshape(-1), colours.reshape(-1), origin, []
        )

    def _tile(self, rng: np.random.Generator, image: Any, letter: int, colour: int, row: int, column: int) -> None:
        ink = self.letters[rng.integers(len(self.letters)), letter, rng.integers(self.letters.shape[2])]
        ink = np.roll(ink, tuple(rng.integers(-1, 2, size=2)), (0, 1)).astype(np.float32)[:, :, None] / 255
        tone = np.asarray(COLOURS[COLOUR_NAMES[colour]], np.float32) + rng.integers(-20, 21, size=3)
        pen = np.float32(rng.uniform(225, 255) if rng.random() < 0.5 else rng.uniform(0, 25))
        noise = rng.integers(-6, 7, size=(TILE, TILE, 3))
        y, x = row * PATCH, column * PATCH
        image[y : y + TILE, x : x + TILE] = (tone * (1 - ink) + pen * ink + noise).astype(np.float32)

    def _sheet(self, rng: np.random.Generator, image: Any, things: Any, row: int, column: int) -> list[int]:
        paper = np.float32(rng.uniform(215, 245))
        return [self._digit(rng, image, things, row, column + 4 * n, paper) for n in range(2)]

    def _digit(self, rng: np.random.Generator, image: Any, things: Any, row: int, column: int, paper: Any) -> int:
        which = int(rng.integers(len(self.digits)))
        ink = self.digits[which].astype(np.float32)[:, :, None] / 255
        y, x = row * PATCH, column * PATCH
        dy, dx = rng.integers(0, 4, size=2)
        image[y : y + TILE, x : x + TILE] = paper
        image[y + dy : y + dy + 13, x + dx : x + dx + 13] *= 1 - np.float32(0.9) * ink
        things[row : row + 4, column : column + 4] = 1 + len(LETTERS) + self.values[which]
        return int(self.values[which])

    def _questions(
        self,
        rng: np.random.Generator,
        grid: int,
        origin: tuple[int, int],
        tiles: list[tuple[int, int, int, int]],
        pairs: list[tuple[int, int]],
        number: tuple[list[int], int, int] | None,
        absent: list[int],
    ) -> list[Question]:
        """One question of every kind that the scene allows, then more of them until 16."""

        def patches(row: int, column: int, width: int = 4) -> list[int]:
            return [r * grid + c for r in range(row, row + 4) for c in range(column, column + width)]

        name = [LETTERS[t[0]] for t in tiles]
        tone = [COLOUR_NAMES[t[1]] for t in tiles]
        where = [patches(t[2], t[3]) for t in tiles]
        by_colour = {c: [n for n in range(len(tiles)) if tone[n] == c] for c in COLOUR_NAMES}
        found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
        for n in range(len(tiles)):
            row, column = tiles[n][2] + origin[0] + 2, tiles[n][3] + origin[1] + 2
            found["colour"].append(ask("colour", [tone[n]], where[n], name[n]))
            if abs(2 * row - GRID) > 2 and abs(2 * column - GRID) > 2:
                quadrant = QUADRANTS[2 * (2 * row > GRID) + (2 * column > GRID)]
                found["where"].append(ask("where", [quadrant], where[n], name[n]))
            if len(by_colour[tone[n]]) == 1:
                found["letter"].append(ask("letter", [name[n]], where[n], tone[n]))
        for colour, same in by_colour.items():
            if 1 <= len(same) <= len(NUMBERS):
                tokens = [p for n in same for p in where[n]]
                found["count"].append(ask("count", [NUMBERS[len(same) - 1]], tokens, colour))
        for a, b in pairs:
            found["right"].append(ask("right", [name[b]], where[a] + where[b], name[a]))
            found["left"].append(ask("left", [name[a]], where[a] + where[b], name[b]))
        for n in range(min(len(tiles), len(absent))):
            yes = rng.random() < 0.5
            evidence = where[n] if yes else []
            letter = name[n] if yes else LETTERS[absent[n]]
            found["exists"].append(ask("exists", ["yes" if yes else "no"], evidence, letter))
        if number is not None:
            found["number"].append(ask("number", [str(v) for v in number[0]], patches(number[1], number[2], 8)))
        for _ in range(2 * len(tiles)):
            a, b = rng.integers(len(tiles), size=2) if tiles else (0, 0)
            if a != b and abs(tiles[a][3] - tiles[b][3]) >= 2:
                answer = "yes" if tiles[a][3] < tiles[b][3] else "no"
                found["before"].append(ask("before", [answer], where[a] + where[b], name[a], name[b]))
        kinds = [k for k in KINDS if found[k]]
        chosen = [found[k][rng.integers(len(found[k]))] for k in kinds]
        while len(chosen) < 16:
            some = found[kinds[rng.integers(len(kinds))]]
            chosen.append(some[rng.integers(len(some))])
        return chosen[:16]
