"""Answers the questions of one split from the tokens that each setting keeps.

    python -m bench.judge evaluate --seed 0 --split val
    python -m bench.judge evaluate --seed 0 --split test

The splits "second" and "third" (the validation split again) and "test2" (other scenes of the test's pictures) are the
second round's: see second.py. "fourth" (other scenes of the validation's pictures) and "test3" are the fourth's: see
fourth.py; "fifth" and "test4", likewise, the fifth's: see fifth.py; "sixth", "test6" and "test7" the
sixth's: see sixth.py.

Per setting, keep and question: whether the answer is right, whether it is the unpruned one, the Kullback-Leibler
divergence of the first answer's distribution from the unpruned one, and the share of the evidence that was kept. All of
it goes to results/seed<n>-<split>.npz, from which `python -m bench.judge report` makes the table and the plot.
"""

import argparse
import dataclasses
import pathlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from script_kernels import methods
from script_kernels.calibrate import Candidate, calibrate

from .model import Judge
from .scenes import GRID, KINDS, Composer, Scene
from .train import images_of, load

RESULTS = pathlib.Path(__file__).parent / "results"
TOKENS = 576
KEEPS = (288, 192, 128, 64, 32)  # 50, 33, 22, 11 and 5.6 %
CHOOSE = (128, 64)  # where knobs are chosen
GENERATORS = {"val": 2_000_003, "second": 2_000_003, "third": 2_000_003, "test": 3_000_017, "test2": 4_000_037}
GENERATORS |= {"fourth": 5_000_111, "test3": 7_000_003, "fifth": 8_000_009, "test4": 11_000_027, "test5": 13_000_027}
GENERATORS |= {"sixth": 23_000_009, "test6": 29_000_011, "test7": 31_000_003}
IMAGES = 120
# Where the pictures are from that scenes are composed of.
BANKS = {"second": "val", "third": "val", "test2": "test", "fourth": "val", "test3": "test"}
BANKS |= {"fifth": "val", "test4": "test", "test5": "test", "sixth": "val", "test6": "test", "test7": "test"}
BATCH = 32
PAIRS = 32  # images and questions that options are calibrated on, without their answers


@dataclass(frozen=True)
class Setting:
    """A method with its options, and the relevance it gets.

    `pair` is by the tower's sentences, `words` by the language model's embeddings, `chance` deals that of the words out
    to the tokens by chance, `evidence` is an oracle.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    reduce: str = "mean"
    negate: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        parts = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options.items()]
        parts += (
            [self.source] * bool(self.source) + [self.reduce] * (self.reduce != "mean") + ["inverted"] * self.negate
        )
        return self.method + (f" ({', '.join(parts)})" if parts else "")


def settings() -> list[Setting]:
    """All that are tried, each family's published or present setting first."""
    free = [
        Setting(m) for m in ("random", "stride", "dpp", "divprune", "gsp", "otprune", "tome_drop", "dart", "script")
    ]
    free += [Setting("script", {"survivors": s, "combine": "restrict"}) for s in (2.0, 2.5)]
    asked = []
    for source in ("pair", "words"):
        s: dict[str, Any] = {"source": source}
        asked += [
            Setting("cdpruner", **s),
            Setting("cdpruner", negate=True, **s),
            Setting("cdpruner", reduce="max", **s),
        ]
        for knob in ({"power": 0.5}, {"power": 2.0}, {"power": 4.0}, {"mix": 0.5}, {"mix": 0.8}, {"floor": 0.3}):
            asked.append(Setting("cdpruner", knob, reduce="max", **s))
        asked += [
            Setting("cdpruner", knob, **s) for knob in ({"power": 2.0}, {"mix": 0.5}, {"mix": 0.3}, {"floor": 0.6})
        ]
        asked += [Setting("script", **s), Setting("script", reduce="max", **s)]
        asked += [Setting("script", knob, **s) for knob in ({"mix": 0.5}, {"mix": 0.3}, {"floor": 0.6})]
        for combine in ("restrict", "union"):
            asked.append(Setting("script", {"combine": combine}, reduce="max", **s))
        asked += [Setting("script", {"gsp_drop": 0.5}, reduce="max", **s)]
        asked += [Setting("script", {"oversample": 4.0}, reduce="max", **s)]
        asked += [Setting("script", {"gsp_drop": 0.5, "power": 2.0}, reduce="max", **s)]
        for few in (2.0, 2.5):
            graph = {"survivors": few, "combine": "restrict"}
            asked += [Setting("script", {**graph, "floor": 0.3}, reduce=reduce, **s) for reduce in ("max", "mean")]
            asked += [Setting("script", {**graph, "floor": 0.6}, **s), Setting("script", {**graph, "mix": 0.5}, **s)]
        asked += [Setting("resprune", reduce="max", **s), Setting("resprune", {"alpha": 4.0}, reduce="max", **s)]
        asked += [Setting("mmr", {"balance": b}, reduce="max", **s) for b in (0.5, 0.8)]
        asked += [Setting("relevance", **s), Setting("relevance", reduce="max", **s)]
    oracle = [Setting("relevance", source="evidence"), Setting("cdpruner", {"floor": 0.3}, source="evidence")]
    return [*free, *asked, Setting("released_script", source="pair"), *oracle]


@dataclass
class Exam:
    """A split's scenes as one judge sees them, and their questions one by one."""

    judge: Judge
    tokens: Tensor  # (images, N, width), projected
    aligned: Tensor  # (images, N, aligned)
    position: Tensor  # (images, N, 2)
    image: Tensor  # (questions,)
    kind: list[str]
    words: Tensor  # (questions, LENGTH)
    answers: Tensor  # (questions, LENGTH)
    evidence: Tensor  # (questions, N) bool

    @classmethod
    @torch.no_grad()
    def of(cls, judge: Judge, scenes: list[Scene]) -> "Exam":
        tokens, aligned, places = [], [], []
        for start in range(0, len(scenes), 16):
            images, position = images_of(scenes[start : start + 16])
            seen = judge.tower(images, position)
            tokens.append(judge.projector(seen.features))
            aligned.append(seen.aligned)
            places.append(position)
        # The first questions of a scene are one of every kind that it allows.
        asked = [(b, q) for b, s in enumerate(scenes) for q in s.questions[: len({q.kind for q in s.questions})]]
        evidence = torch.zeros(len(asked), TOKENS, dtype=torch.bool)
        for n, (_, q) in enumerate(asked):
            evidence[n, q.evidence] = True
        return cls(
            judge,
            torch.cat(tokens),
            torch.cat(aligned),
            torch.cat(places),
            torch.tensor([b for b, _ in asked]),
            [q.kind for _, q in asked],
            torch.tensor([q.words for _, q in asked]),
            torch.tensor([q.answers for _, q in asked]),
            evidence,
        )

    def __len__(self) -> int:
        return len(self.kind)

    @torch.no_grad()
    def relevance(self, setting: Setting, at: Tensor) -> Tensor | None:
        """(len(at), N), as a user gets it: from the words of the question."""
        words, image = self.words[at], self.image[at]
        if setting.source == "":
            return None
        if setting.source == "evidence":
            return self.evidence[at].float()
        if setting.source == "chance":
            found = self.relevance(dataclasses.replace(setting, source="words"), at)
            assert found is not None
            draws = [torch.Generator().manual_seed(n) for n in at.tolist()]
            return torch.stack([r[torch.randperm(len(r), generator=g)] for r, g in zip(found, draws, strict=True)])
        # Only the question: a number's first digit stands among the words to predict the second from.
        last = (self.answers[at] > 0).float().argmax(1)
        known = torch.arange(words.shape[1]) <= last[:, None]
        if setting.reduce == "centred":
            from .fourth import centred

            return centred(self.tokens[image], self.judge.words(words), known)
        how: dict[str, Any] = {"reduce": setting.reduce, "negate": setting.negate}
        if setting.source == "pair":
            return methods.relevance_of(self.aligned[image], self.judge.tower.query(words), known, **how)
        return methods.relevance_of(self.tokens[image], self.judge.words(words), known, **how)

    @torch.no_grad()
    def kept(self, setting: Setting, keep: int) -> Tensor:
        """(questions, keep) token indices."""
        if setting.source == "":
            return methods.select(self.tokens, None, keep, method=rule_of(setting), **setting.options)[self.image]
        parts = []
        for at in torch.arange(len(self)).split(64):
            relevance = self.relevance(setting, at)
            tokens, options = self.tokens[self.image[at]], dict(setting.options)
            if "beside" in options:  # a second relevance, named by its reduction
                second = dataclasses.replace(setting, reduce=options["beside"])
                options["beside"] = self.relevance(second, at)
            if methods.facts_of(rule_of(setting)) and relevance is not None:  # as the integrations tell them
                above = self.relevance(dataclasses.replace(setting, reduce="above"), at)
                options |= {"above": above, "grids": [(GRID, GRID)]}
            parts.append(methods.select(tokens, relevance, keep, method=rule_of(setting), **options))
        return torch.cat(parts)

    @torch.no_grad()
    def answer(self, kept: Tensor | None, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Words said (questions, LENGTH) and log-probabilities of the first answer (questions, words).

        Questions that see the same tokens of the same image share a sequence.
        """
        image = self.image if image is None else image
        groups: dict[Any, list[int]] = {}
        for n, b in enumerate(image.tolist()):
            groups.setdefault((b, b"" if kept is None else kept[n].numpy().tobytes()), []).append(n)
        said = torch.empty_like(self.answers)
        first = torch.empty(len(self), self.judge.bias.numel())
        last = (self.answers > 0).float().argmax(1)
        alike = sorted(groups.values(), key=len)
        while alike:
            some, alike = alike[:BATCH], alike[BATCH:]
            at = torch.tensor([g[0] for g in some])
            tokens, position = self.tokens[image[at]], self.position[image[at]]
            if kept is not None:
                index = kept[at][..., None]
                tokens = tokens.gather(1, index.expand(-1, -1, tokens.shape[2]))
                position = position.gather(1, index.expand(-1, -1, 2))
            asked = [g + g[:1] * (len(some[-1]) - len(g)) for g in some]  # the longest comes last
            with torch.autocast("cpu", torch.bfloat16):  # as it was trained
                logits = self.judge(tokens, position, self.words[torch.tensor(asked)]).float()
            for b, group in enumerate(some):
                said[group] = logits[b, : len(group)].argmax(-1)
                first[group] = F.log_softmax(logits[b, torch.arange(len(group)), last[group]], -1)
        return said, first

    def right(self, said: Tensor, like: Tensor | None = None) -> Tensor:
        """(questions,) bool: every asked word as in `like`, the true answers if None."""
        return ((said == (self.answers if like is None else like)) | (self.answers == 0)).all(1)


def rule_of(setting: Setting) -> str | methods.Method:
    from .second import rule_of

    return rule_of(setting)


def auc(score: Tensor, evidence: Tensor) -> float:
    """Mean over questions of the area under the curve of a relevance against the evidence."""
    found = []
    for s, e in zip(score, evidence, strict=True):
        if e.any():
            rank = s.argsort().argsort().double() + 1
            n = int(e.sum())
            found.append(float((rank[e].sum() - n * (n + 1) / 2) / (n * (len(s) - n))))
    return float(np.mean(found))


def exam(seed: int, split: str, images: int | None = None) -> Exam:
    composer, rng = Composer(BANKS.get(split, split)), np.random.default_rng(GENERATORS[split])
    return Exam.of(load(seed), [composer.scene(rng) for _ in range(images or IMAGES)])


def calibrated(seed: int, keep: int = 64) -> Setting:
    """The setting that calibration finds on PAIRS training images with a question each, and no answers."""
    composer, rng = Composer("train"), np.random.default_rng([seed, 32])
    given = Exam.of(load(seed), [composer.scene(rng) for _ in range(PAIRS)])
    first = [given.image.tolist().index(b) for b in range(PAIRS)]
    # One question of each image, and of every kind in turn.
    at = torch.tensor([f + b % int((given.image == b).sum()) for b, f in enumerate(first)])
    for name in ("image", "words", "answers", "evidence"):
        setattr(given, name, getattr(given, name)[at])
    given.kind = [given.kind[n] for n in at.tolist()]
    seen: dict[str, Tensor] = {}

    def run(n: int, candidate: Candidate | None) -> Tensor:
        key = "" if candidate is None else candidate.key
        if key not in seen:  # all questions at once: one by one would take the small model longer
            kept = None if candidate is None else given.kept(setting_of(candidate), keep)
            seen[key] = given.answer(kept)[1]
        return seen[key][n][None]

    found = calibrate(run, list(range(PAIRS)), keep=keep)
    print(found.table())
    return dataclasses.replace(setting_of(found.best), label=f"calibrated on {PAIRS} pairs")


def setting_of(candidate: Candidate) -> Setting:
    """A candidate with the relevance that `prune_inputs` gives it, that of the embeddings of the question's words."""
    source = "words" if candidate.query else ""
    return Setting(candidate.method, candidate.options, source, candidate.reduce, candidate.negate)


def evaluate(given: Exam, chosen: list[Setting], keeps: tuple[int, ...], log: Any = print) -> dict[str, Any]:
    """Arrays of (settings, keeps, questions), with what they are of."""
    said, before = given.answer(None)
    shape = (len(chosen), len(keeps), len(given))
    found: dict[str, Any] = {
        "settings": np.array([s.name for s in chosen]),
        "keeps": np.array(keeps),
        "image": given.image.numpy(),
        "kind": np.array([KINDS.index(k) for k in given.kind]),
        "unpruned": given.right(said).numpy(),
        "other_image": given.right(given.answer(None, (given.image + 1) % len(given.tokens))[0]).numpy(),
        "right": np.zeros(shape, bool),
        "same": np.zeros(shape, bool),
        "kl": np.zeros(shape, np.float16),
        "evidence": np.full(shape, np.nan, np.float16),
    }
    log(f"unpruned {100 * found['unpruned'].mean():.1f} %, of another image {100 * found['other_image'].mean():.1f} %")
    sources = sorted({(s.source, s.reduce) for s in chosen if s.source not in ("", "evidence")})
    everything = torch.arange(len(given))
    for source, reduce in sources:
        relevance = given.relevance(Setting("relevance", source=source, reduce=reduce), everything)
        assert relevance is not None
        found[f"auc {source} {reduce}"] = auc(relevance, given.evidence)
        log(f"area under the curve, relevance {source} {reduce}: {found[f'auc {source} {reduce}']:.3f}")
    for n, setting in enumerate(chosen):
        begun = time.perf_counter()
        for m, keep in enumerate(keeps):
            kept = given.kept(setting, keep)
            now, after = given.answer(kept)
            found["right"][n, m] = given.right(now).numpy()
            found["same"][n, m] = given.right(now, said).numpy()
            found["kl"][n, m] = (before.exp() * (before - after)).sum(1).clamp(0, 100).numpy()
            size = given.evidence.sum(1)
            share = given.evidence.gather(1, kept).sum(1) / size
            found["evidence"][n, m] = torch.where(size > 0, share, torch.nan).numpy()
        scores = " ".join(f"{100 * v:5.1f}" for v in found["right"][n].mean(-1))
        log(f"{setting.name:60s} {scores}   {time.perf_counter() - begun:.1f} s")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.judge evaluate", description="Answers a split's questions.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=tuple(GENERATORS), default="val")
    parser.add_argument("--images", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    chosen = settings()
    keeps: tuple[int, ...] = CHOOSE
    if given.split == "test":
        from .report import reported

        chosen, keeps = [*reported(), calibrated(given.seed)], KEEPS
    elif given.split in BANKS:
        from . import fifth, fourth, second, sixth

        chosen = {
            "second": second.second,
            "third": second.third,
            "test2": second.opened,
            "fourth": fourth.fourth,
            "test3": fourth.opened,
            "fifth": fifth.fifth,
            "test4": fifth.opened,
            "test5": fifth.confirmed,
            "sixth": sixth.sixth,
            "test6": sixth.opened,
            "test7": sixth.again,
        }[given.split]()
        keeps = (*CHOOSE, 32) if given.split.startswith("test") else CHOOSE
        if given.split == "test6":
            chosen.append(calibrated(given.seed))
    found = evaluate(exam(given.seed, given.split, given.images), chosen, keeps)
    if given.split in ("test", "test6"):
        found["calibrated"] = repr(dataclasses.replace(chosen[-1], label="").name)
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(RESULTS / f"seed{given.seed}-{given.split}.npz", **found)


if __name__ == "__main__":
    main()
