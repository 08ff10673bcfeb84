"""Trains a judge: `python -m bench.judge train --seed 0`. Stops and goes on at any point: state is kept in --work.

Phases: the tower on mosaics of tiles, then on small scenes; then, with the tower frozen, projector and language model
on scenes of 256 tokens, then on whole ones of 576. A smaller scene has fewer tiles and lies anywhere in the same
canvas; all its tokens are seen. No phase drops a token.

Three things make a language model of this size learn it in minutes. A question ends with the name it asks about. The
first layer's first head is taught to look, from a word, at what it names, and the second layer's, where a letter or
digit is to be answered, at what shows it. And what is looked at is passed on as it is from the first step. Without
the first two, 1500 steps did not find a word's picture; without the last, 250 steps did not name what was found.
"""

import argparse
import hashlib
import math
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Judge, coordinates
from .scenes import GRID, KINDS, Composer, Scene

WEIGHTS = pathlib.Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Phase:
    name: str
    tower: bool
    grid: int
    batch: int
    steps: int
    rate: float
    grounding: float = 0.0
    mosaic: bool = False


PHASES = (
    Phase("tiles", True, 12, 32, 600, 2e-3, mosaic=True),
    Phase("tower-small", True, 12, 32, 300, 1.5e-3),
    Phase("answers-small", False, 16, 20, 300, 1.5e-3, 0.5),
    Phase("answers-whole", False, GRID, 16, 240, 1e-3, 0.2),
)


def images_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pictures (B, H, W, 3) uint8 and the places (B, N, 2) of their patches."""
    grid = scenes[0].image.shape[0] // 4
    images = torch.from_numpy(np.stack([s.image for s in scenes]))
    return images, coordinates(grid, torch.tensor([s.origin for s in scenes]))


def labels_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """What each token lies on, and the colour there: two of (B, N)."""
    return torch.from_numpy(np.stack([s.things for s in scenes])), torch.from_numpy(
        np.stack([s.colours for s in scenes])
    )


def questions_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Words and answers, two of (B, Q, LENGTH)."""
    words = torch.tensor([[q.words for q in s.questions] for s in scenes])
    return words, torch.tensor([[q.answers for q in s.questions] for s in scenes])


def sentences_of(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """One question of each scene with its answer, (B, 8) word ids: what the tower's pairs are made of."""
    rows = []
    for scene in scenes:
        q = scene.questions[rng.integers(len(scene.questions))]
        words = [w for w in q.words if w] + [next(a for a in reversed(q.answers) if a)]
        rows.append(words + [0] * (8 - len(words)))
    return torch.tensor(rows)


@torch.no_grad()
def accuracy(judge: Judge, scenes: list[Scene]) -> dict[str, float]:
    """Share of questions answered wholly right from all tokens, by kind and over all."""
    judge.eval()
    right: dict[str, list[float]] = {k: [] for k in KINDS}
    for start in range(0, len(scenes), 16):
        some = scenes[start : start + 16]
        images, position = images_of(some)
        words, answers = questions_of(some)
        with torch.autocast("cpu", torch.bfloat16):
            said = judge(judge.projector(judge.tower(images, position).features), position, words).argmax(-1)
        good = ((said == answers) | (answers == 0)).all(-1)
        for b, scene in enumerate(some):
            for n, q in enumerate(scene.questions):
                right[q.kind].append(float(good[b, n]))
    by_kind = {k: float(np.mean(v)) for k, v in right.items() if v}
    return {**by_kind, "mean": float(np.mean([by_kind[k] for k in by_kind]))}


def step_loss(
    judge: Judge, phase: Phase, scenes: list[Scene], rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    images, position = images_of(scenes)
    things, colours = labels_of(scenes)
    if phase.mosaic:
        losses = judge.tower.losses(judge.tower(images, position), things, colours)
        total = losses["thing"] + losses["colour"]
    elif phase.tower:
        losses = judge.tower.losses(judge.tower(images, position), things, colours, sentences_of(scenes, rng))
        total = losses["thing"] + losses["colour"] + 0.1 * losses["pair"]
    else:
        with torch.no_grad():
            features = judge.tower(images, position).features
        words, answers = questions_of(scenes)
        tokens = judge.projector(features)
        logits = judge(tokens, position, words)
        losses = {"answer": F.cross_entropy(logits.float().flatten(0, 2), answers.flatten(), ignore_index=0)}
        losses["grounding"] = judge.grounding(tokens, things, colours)
        losses["pointing"] = judge.pointing(words, answers, things, colours)
        total = losses["answer"] + phase.grounding * (losses["grounding"] + losses["pointing"])
    return total, {name: float(value.detach()) for name, value in losses.items()}


def train(seed: int, work: pathlib.Path, log: Any = print) -> Judge:
    """Trains the judge of this seed, or goes on with it; `work` holds its state."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    judge = Judge()
    composer, val = Composer("train"), Composer("val")
    val_rng = np.random.default_rng(1_000_003)
    checks = {grid: [val.scene(val_rng, grid) for _ in range(96)] for grid in sorted({p.grid for p in PHASES})}
    state_path = work / f"seed{seed}.pt"
    state: dict[str, Any] = (
        torch.load(state_path, weights_only=True) if state_path.exists() else {"phase": 0, "step": 0}
    )
    if "judge" in state:
        judge.load_state_dict(state["judge"])
    for number, phase in enumerate(PHASES):
        if number < state["phase"]:
            continue
        module = [judge.tower] if phase.tower else [m for n, m in judge.named_children() if n != "tower"]
        params = [p for m in module for p in m.parameters()] + ([] if phase.tower else [judge.order, judge.bias])
        optimizer = torch.optim.AdamW(params, lr=phase.rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
        first = state["step"] if number == state["phase"] else 0
        if first and "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        judge.train()
        judge.tower.train(phase.tower)  # frozen, its batch statistics too
        begun = time.perf_counter()
        total: dict[str, float] = {}
        for step in range(first, phase.steps):
            # Step by step a generator of its own, so that a run that goes on sees the scenes it would have seen.
            rng = np.random.default_rng([seed, number, step])
            compose = composer.mosaic if phase.mosaic else composer.scene
            scenes = [compose(rng, phase.grid) for _ in range(phase.batch)]
            warm = min(1.0, (step + 1) / 50)
            rate = phase.rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / phase.steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss, parts = step_loss(judge, phase, scenes, rng)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            total = {k: 0.95 * total.get(k, v) + 0.05 * v for k, v in parts.items()}
            if (step + 1) % 50 == 0 or step + 1 == phase.steps:
                state = {
                    "phase": number,
                    "step": step + 1,
                    "judge": judge.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                torch.save(state, work / "saving.pt")
                (work / "saving.pt").replace(state_path)
                line = " ".join(f"{k} {v:.3f}" for k, v in total.items())
                seconds = (time.perf_counter() - begun) / (step + 1 - first)
                log(f"seed {seed} {phase.name} {step + 1}/{phase.steps} {line} | {seconds:.2f} s a step")
            if not phase.tower and ((step + 1) % 100 == 0 or step + 1 == phase.steps):
                score = accuracy(judge, checks[phase.grid])
                judge.train()
                judge.tower.eval()
                log(f"seed {seed} {phase.name} val " + " ".join(f"{k} {100 * v:.1f}" for k, v in score.items()))
        state = {"phase": number + 1, "step": 0, "judge": judge.state_dict()}
        torch.save(state, state_path)
        torch.save(state, work / f"seed{seed}-{phase.name}.pt")
    return judge


def save(judge: Judge, path: pathlib.Path) -> str:
    """Writes the weights in bfloat16 as safetensors and gives their SHA-256."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to(torch.bfloat16).contiguous() for k, v in judge.state_dict().items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(seed: int) -> Judge:
    """The committed judge of this seed, in float32, in evaluation mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS / f"seed{seed}.safetensors").items()})
    return judge.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.judge train", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("bench/out/judge"), help="checkpoints")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    with (given.work / f"seed{given.seed}.log").open("a") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        judge = train(given.seed, given.work, say)
        path = WEIGHTS / f"seed{given.seed}.safetensors"
        digest = save(judge, path)
        say(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, sha256 {digest}")


if __name__ == "__main__":
    main()
