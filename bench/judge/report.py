"""Chooses knobs on the validation split by the rule of RULE.md, and reports the test split: table and plot."""

import argparse
import pathlib
from statistics import NormalDist
from typing import Any

import numpy as np

from .evaluate import CHOOSE, GENERATORS, RESULTS, TOKENS, Setting, settings

PLOT = pathlib.Path(__file__).parents[2] / "docs" / "judge.png"
FAMILIES = ("cdpruner", "script", "resprune", "mmr", "relevance")


def read(split: str) -> dict[int, Any]:
    """What was evaluated of a split, by seed."""
    return {int(p.stem[4:].split("-")[0]): dict(np.load(p)) for p in sorted(RESULTS.glob(f"seed*-{split}.npz"))}


def chosen() -> list[Setting]:
    """The setting of each family and source that does best on the validation split."""
    runs = read("val")
    if not runs:
        raise FileNotFoundError(f"{RESULTS}: expected seed*-val.npz (python -m bench.judge evaluate --split val)")
    names = [s.name for s in settings()]
    assert all(list(run["settings"]) == names and tuple(run["keeps"]) == CHOOSE for run in runs.values())
    mean = np.mean([run["right"].mean((1, 2)) for run in runs.values()], axis=0)
    best = []
    for family in FAMILIES:
        for source in ("pair", "words"):
            some = [n for n, s in enumerate(settings()) if s.method == family and s.source == source]
            best.append(settings()[max(some, key=lambda n: (mean[n], -n))])
    return best


def most_kept(split: str, answered: list[Setting], candidates: list[Setting]) -> Setting:
    """Of candidates that answered a split, the one whose worst seed keeps most of the unpruned answers at 11 %."""
    runs, names = read(split), [s.name for s in answered]
    if not runs:
        raise FileNotFoundError(f"results: expected seed*-{split}.npz (evaluate --split {split})")
    assert all(list(run["settings"]) == names and tuple(run["keeps"]) == CHOOSE for run in runs.values())
    at = CHOOSE.index(64)

    def worst(setting: Setting) -> float:
        n = names.index(setting.name)
        return min(float(run["right"][n, at].mean() / run["unpruned"].mean()) for run in runs.values())

    return max(candidates, key=worst)


def reported() -> list[Setting]:
    """What the test split is opened for."""
    every = settings()
    some = [s for s in every if s.source in ("", "evidence")]
    for family in FAMILIES:
        for source in ("pair", "words"):
            some.append(next(s for s in every if s.method == family and s.source == source))
    some += [s for s in every if s.method == "released_script"]
    some += [s for s in every if s.negate]
    some += [s for s in chosen() if s.name not in {t.name for t in some}]
    return [
        *some,
        next(s for s in every if s.method == "script" and s.options == {"floor": 0.6} and s.source == "words"),
    ]


def difference(a: Any, b: Any, image: Any, level: float = 0.95) -> tuple[float, float]:
    """Mean of a - b over questions and the half width of its interval, with a scene's questions as one cluster."""
    d = a.astype(float) - b.astype(float)
    mean = d.mean()
    images = np.unique(image)
    sums = np.array([(d[image == i] - mean).sum() for i in images])
    error = np.sqrt((sums**2).sum() * len(images) / max(len(images) - 1, 1)) / len(d)
    return float(mean), float(NormalDist().inv_cdf(0.5 + level / 2) * error)


def table(runs: dict[int, Any]) -> str:
    """Markdown: accuracy by keep, seed by seed, and at 11 % how far from the best query-free rule."""
    keeps = next(iter(runs.values()))["keeps"].tolist()
    lines = [
        "| setting | "
        + " | ".join(f"{100 * k / TOKENS:.1f} %" for k in keeps)
        + " | of unpruned at 11.1 % | evidence at 11.1 % | KL at 11.1 % |"
    ]
    lines.append("|---" * (len(keeps) + 4) + "|")
    names = list(next(iter(runs.values()))["settings"])
    at = keeps.index(64)
    mean = np.mean([r["right"][:, at].mean(1) for r in runs.values()], axis=0)
    order = sorted(range(len(names)), key=lambda n: -mean[n])
    for n in order:
        cells = [" / ".join(f"{100 * r['right'][n, m].mean():.1f}" for r in runs.values()) for m in range(len(keeps))]
        share = " / ".join(f"{100 * np.nanmean(r['evidence'][n, at].astype(float)):.0f}" for r in runs.values())
        kl = " / ".join(f"{r['kl'][n, at].astype(float).mean():.2f}" for r in runs.values())
        part = " / ".join(f"{100 * r['right'][n, at].mean() / r['unpruned'].mean():.1f}" for r in runs.values())
        lines.append(f"| {names[n]} | " + " | ".join([*cells, part, share, kl]) + " |")
    return "\n".join(lines)


def comparisons(runs: dict[int, Any], against: str, keep: int) -> str:
    """Markdown: each setting minus one of them at a keep, with joint 95 % intervals, seed by seed."""
    lines = []
    for seed, run in runs.items():
        names, m = list(run["settings"]), list(run["keeps"]).index(keep)
        level = 1 - 0.05 / len(names)
        base = run["right"][names.index(against), m]
        found = [(name, *difference(run["right"][n, m], base, run["image"], level)) for n, name in enumerate(names)]
        for name, mean, half in sorted(found, key=lambda f: -f[1]):
            mark = "better" if mean > half else "worse" if mean < -half else "tied"
            lines.append(f"| {seed} | {name} | {100 * mean:+.1f} ± {100 * half:.1f} | {mark} |")
    return f"| seed | setting | minus {against} at {100 * keep / TOKENS:.1f} % | |\n|---|---|---|---|\n" + "\n".join(
        lines
    )


def unbeaten(runs: dict[int, Any]) -> dict[str, list[str]]:
    """Rule 5: by setting, what is better beyond the joint interval in any seed at 22 or 11 %; oracles apart."""
    names = [n for n in next(iter(runs.values()))["settings"] if "evidence" not in n]
    found: dict[str, list[str]] = {name: [] for name in names}
    for seed, run in runs.items():
        at = {name: n for n, name in enumerate(run["settings"])}
        level = 1 - 0.05 / len(at)
        for keep in CHOOSE:
            right = run["right"][:, list(run["keeps"]).index(keep)]
            for name in names:
                for other in names:
                    mean, half = difference(right[at[other]], right[at[name]], run["image"], level)
                    if mean > half:
                        found[name].append(f"{other} by {100 * mean:.1f} at {keep}, seed {seed}")
    return found


# What the plot draws: setting, label, line.
DRAWN = (
    ("relevance (evidence)", "oracle: the evidence first", "k--"),
    ("script (survivors=2, combine=restrict, floor=0.3, words, max)", "script in the integrations", "C3-"),
    ("calibrated on 32 pairs", "calibrated, without answers", "C4-"),
    ("dpp", "diversity alone (DPP)", "C0-"),
    ("divprune", "DivPrune", "C1-"),
    ("cdpruner (words)", "CDPruner, relevance by words", "C2-"),
    ("cdpruner (pair)", "CDPruner, relevance by sentence encoder", "C2:"),
    ("relevance (words)", "relevance alone, by words", "C5-"),
    ("random", "random", "C7-"),
)


def plot(runs: dict[int, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 4.2), sharey=True, squeeze=False)
    for axis, (seed, run) in zip(axes[0], runs.items(), strict=True):
        names, share = list(run["settings"]), 100 * run["keeps"] / TOKENS
        axis.axhline(100 * run["unpruned"].mean(), color="black", linewidth=0.8, label="unpruned")
        for name, label, line in DRAWN:
            axis.plot(share, 100 * run["right"][names.index(name)].mean(-1), line, marker=".", label=label)
        axis.set_xscale("log")
        axis.set_xticks(share, [f"{s:.0f}" for s in share])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_title(f"seed {seed}")
        axis.set_xlabel("visual tokens kept, %")
    axes[0][0].set_ylabel("right answers, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), ncol=4, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.judge report", description="Table of a test split, and the first one's plot."
    )
    splits = tuple(split for split in GENERATORS if split != "val")
    parser.add_argument("--split", choices=splits, default="test")
    split = parser.parse_args(argv).split
    if split == "test":
        for s in chosen():
            print("chosen:", s.name)
    runs = read(split)
    if not runs:
        return
    for seed, run in runs.items():
        unpruned, other = (100 * run[name].mean() for name in ("unpruned", "other_image"))
        print(f"seed {seed}: unpruned {unpruned:.1f}, other image {other:.1f}")
        print({k: round(float(v), 3) for k, v in run.items() if k.startswith("auc")})
        if "calibrated" in run:
            print("calibrated:", run["calibrated"])
    text = table(runs) + "\n\n" + "\n\n".join(comparisons(runs, "dpp", keep) for keep in CHOOSE)
    beaten = unbeaten(runs)
    print("never beaten:", ", ".join(name for name, by in beaten.items() if not by))
    for name, by in beaten.items():
        print(name, "beaten:", len(by), *by[:1])
    (RESULTS / f"{split}.md").write_text(text + "\n")
    if split == "test":
        plot(runs, PLOT)
    print(text)


if __name__ == "__main__":
    main()
