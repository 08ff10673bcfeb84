"""What the integrations' default loses at 11 % kept: right answers by kind once something is put back.

    python -m bench.judge loss --seed 0      # prints a table of the validation split

Kept tokens alone; with all background (what lies on no tile and no sheet); with all of the question's evidence.
"""

import argparse
import dataclasses

import numpy as np
import torch
from torch import Tensor

from .evaluate import GENERATORS, IMAGES, TOKENS, Exam
from .scenes import KINDS, Composer
from .second import DEFAULT
from .train import load

KEEP = 64


def answer(given: Exam, mask: Tensor) -> Tensor:
    """(questions,) bool: answered rightly from the tokens of a mask (questions, N) of any counts."""
    right = torch.empty(len(given), dtype=torch.bool)
    counts = mask.sum(1)
    for count in counts.unique().tolist():
        at = (counts == count).nonzero()[:, 0]
        some = {name: getattr(given, name)[at] for name in ("image", "words", "answers", "evidence")}
        part = dataclasses.replace(given, kind=[given.kind[n] for n in at.tolist()], **some)
        right[at] = part.right(part.answer(mask[at].nonzero()[:, 1].view(len(at), count))[0])
    return right


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.judge loss", description="What a default's loss comes from.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    composer, rng = Composer("val"), np.random.default_rng(GENERATORS["val"])
    scenes = [composer.scene(rng) for _ in range(asked.images)]
    given = Exam.of(load(asked.seed), scenes)
    kept = torch.zeros(len(given), TOKENS, dtype=torch.bool).scatter(1, given.kept(DEFAULT, KEEP), True)
    background = torch.from_numpy(np.stack([s.things for s in scenes]) == 0)[given.image]
    found = {
        "unpruned": given.right(given.answer(None)[0]),
        "kept": answer(given, kept),
        "kept and all background": answer(given, kept | background),
        "kept and all evidence": answer(given, kept | given.evidence),
    }
    kinds = np.array(given.kind)
    print(f"seed {asked.seed}: of {KEEP} kept tokens {(kept & background).sum(1).float().mean():.1f} are background")
    print("| answered from | all | " + " | ".join(KINDS) + " |\n" + "|---" * (len(KINDS) + 2) + "|")
    for name, right in found.items():
        cells = [f"{100 * right[kinds == kind].float().mean():.0f}" for kind in KINDS]
        print(f"| {name} | {100 * right.float().mean():.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
