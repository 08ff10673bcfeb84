"""Finds, on a user's own questions and without labels, the selection that changes a model's answers least.

The search needs one thing of a model: its next-token log-probabilities for an input, unpruned or with a candidate's
selection. It runs each input unpruned once, and candidates by successive halving: all of them on a few inputs, the
better half on more, until the budget of pruned runs is spent. What is compared is the Kullback-Leibler divergence of
the pruned from the unpruned distributions, and how often the most likely tokens agree.

    def run(question, candidate):                # (tokens, words) log-probabilities; candidate None: unpruned
        ...
    found = calibrate(run, questions, keep=64, budget=400, path="calibration.json")
    found.best.method, found.best.options, found.best.reduce, found.best.negate

Source: successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .options import check_int

FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """A method of `script_kernels.methods` with its options, and how its relevance is taken from the query.

    `reduce` is "mean" or "max" over the query vectors, `negate` inverts the relevance, `query=False` leaves it out.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    reduce: str = "mean"
    negate: bool = False
    query: bool = True

    @property
    def key(self) -> str:
        """One string for each candidate, the same from run to run."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """For people: the method, its options, and the relevance it gets."""
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        return self.method + options + (f", {self.reduce}{' negated' if self.negate else ''}" if self.query else "")


def candidates() -> list[Candidate]:
    """The grid that `calibrate` searches if it is given none: sign, reduction, power, mixture, method, share of GSP."""
    few = {"survivors": 2.5, "combine": "restrict"}
    found = [Candidate(m, query=False) for m in ("dpp", "divprune", "gsp", "script", "stride")]
    found += [Candidate("script", few, query=False)]
    for reduce in ("mean", "max"):
        for negate in (False, True):
            how: dict[str, Any] = {"reduce": reduce, "negate": negate}
            found += [Candidate("cdpruner", {"power": power}, **how) for power in (0.5, 1.0, 2.0)]
            found += [Candidate("cdpruner", {"mix": 0.5}, **how), Candidate("relevance", **how)]
            found += [Candidate("script", {"floor": 0.6}, **how), Candidate("script", {**few, "floor": 0.3}, **how)]
            found += [Candidate("focus", **how)]
    return found


@dataclass(frozen=True)
class Row:
    """What was seen of a candidate: means over `inputs` inputs, and the half width of the 95 % interval of the KL."""

    candidate: Candidate
    inputs: int
    kl: float
    half: float
    agreement: float


@dataclass(frozen=True)
class Calibration:
    """The candidates, best first: those that were tried on more inputs before those that were dropped earlier."""

    keep: int
    rows: tuple[Row, ...]

    @property
    def best(self) -> Candidate:
        return self.rows[0].candidate

    def table(self) -> str:
        """One line per candidate, in Markdown."""
        lines = ["| method | options | relevance | inputs | KL | agreement |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            c = row.candidate
            options = ", ".join(f"{k}={v}" for k, v in c.options.items())
            relevance = f"{c.reduce}{', negated' if c.negate else ''}" if c.query else "none"
            kl, agreement = f"{row.kl:.4f} ± {row.half:.4f}", f"{100 * row.agreement:.1f} %"
            lines.append(f"| {c.method} | {options} | {relevance} | {row.inputs} | {kl} | {agreement} |")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the divergences with their intervals, best on top; needs matplotlib."""
        from matplotlib.figure import Figure

        rows = self.rows[::-1]
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(rows)), layout="constrained")
        axis = figure.subplots()
        half = [0.0 if math.isinf(row.half) else row.half for row in rows]
        axis.errorbar([row.kl for row in rows], range(len(rows)), xerr=half, fmt="o", markersize=4, capsize=2)
        axis.set_yticks(range(len(rows)), [f"{row.candidate.name}  ({row.inputs})" for row in rows], fontsize=7)
        axis.set_xlabel(f"KL from the unpruned model, nats a token, {self.keep} tokens kept; (inputs seen)")
        axis.set_xlim(left=0)
        figure.savefig(path, dpi=130)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all."""
        rows = [{**asdict(row), "half": None if math.isinf(row.half) else row.half} for row in self.rows]
        _write(path, {"format": FORMAT, "keep": self.keep, "rows": rows})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
            ValueError: another format, or no candidates.
        """
        with open(path) as file:
            stored = json.load(file)
        if not isinstance(stored, dict) or stored.get("format") != FORMAT or not stored.get("rows"):
            raise ValueError(f"path: expected a calibration of format {FORMAT}, got {os.fspath(path)}")
        rows = [dict(row) for row in stored["rows"]]
        for row in rows:
            row["candidate"] = Candidate(**row["candidate"])
            row["half"] = math.inf if row["half"] is None else row["half"]
        return cls(stored["keep"], tuple(Row(**row) for row in rows))


def _write(path: str | os.PathLike[str], value: Any) -> None:
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    with open(part, "w") as file:
        json.dump(value, file, indent=1)
    os.replace(part, path)


def compare(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean KL(before || after) over tokens, and the share of tokens whose most likely word agrees.

    Both are (tokens, words) log-probabilities.
    """
    for value, name in ((before, "unpruned"), (after, "pruned")):
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.dtype.is_floating_point:
            raise TypeError(f"run: expected (tokens, words) floating log-probabilities, {name} gave {_what(value)}")
        if bool(torch.isnan(value).any()):
            raise ValueError(f"run: expected log-probabilities, {name} gave NaN")
    if before.shape != after.shape:
        raise ValueError(f"run: expected one shape, got {tuple(before.shape)} unpruned and {tuple(after.shape)} pruned")
    before, after = before.double(), after.double().clamp(min=-1e4)  # a word ruled out costs much, not infinitely much
    share = before.exp()
    kl = torch.where(share > 0, share * (before - after), 0.0).sum(1).mean()
    return max(0.0, float(kl)), float((before.argmax(1) == after.argmax(1)).double().mean())


def _what(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def calibrate(
    run: Callable[[Any, Candidate | None], Tensor],
    inputs: Sequence[Any],
    *,
    keep: int,
    budget: int | None = None,
    grid: Sequence[Candidate] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Searches the grid for the candidate of least divergence from the unpruned model.

    Args:
        run: gives (tokens, words) log-probabilities for an input with a candidate's selection of `keep` tokens, or
            unpruned for None.
        inputs: the user's own; some dozen.
        keep: what `run` keeps; it is recorded, not used.
        budget: pruned runs at most; None: every candidate on every input. At least one for each candidate.
        grid: None: `candidates()`.
        path: a JSON file that what was seen is kept in after each input, and taken up from if it is there. It must be
            of this `keep` and as many inputs; that they are the same ones is for the caller to see to.
        progress: called with the pruned runs done and the most there can be.

    Raises:
        ValueError, TypeError: no inputs, no candidates, two alike, a budget too small, or a `run` that gives something
            else than log-probabilities.
    """
    grid = candidates() if grid is None else list(grid)
    check_int(keep, "keep")
    if not inputs:
        raise ValueError("inputs: expected at least one, got none")
    if not grid or len({c.key for c in grid}) < len(grid):
        raise ValueError(
            f"grid: expected distinct candidates, got {len(grid)} with {len({c.key for c in grid})} distinct"
        )
    most = len(grid) * len(inputs)
    budget = most if budget is None else budget
    check_int(budget, "budget")
    if budget < len(grid):
        raise ValueError(f"budget: expected budget >= {len(grid)}, one run for each candidate, got {budget}")
    seen = _Seen(path, keep, len(inputs))

    left, done, spent = list(grid), 0, 0
    rounds = 1 if budget == most else max(1, math.ceil(math.log2(len(grid))))
    for number in range(rounds):
        last = number == rounds - 1
        affordable = (budget - spent) // len(left) if last else (budget - spent) // ((rounds - number) * len(left))
        upto = min(len(inputs), done + max(affordable, 1 if number == 0 else 0))
        for n in range(done, upto):
            missing = [c for c in left if not seen.has(c, n)]
            if missing:
                before = run(inputs[n], None)
                for c in missing:
                    seen.put(c, n, compare(before, run(inputs[n], c)))
                seen.save()
            spent += len(left)
            if progress is not None:
                progress(spent, min(budget, most))
        done = upto
        if not last:
            left = sorted(left, key=lambda c: seen.row(c, done).kl)[: max(1, math.ceil(len(left) / 2))]
    rows = [seen.row(c, len(inputs)) for c in grid]
    return Calibration(keep, tuple(sorted(rows, key=lambda row: (-row.inputs, row.kl))))


class _Seen:
    """What was measured so far, in memory and in a file."""

    def __init__(self, path: str | os.PathLike[str] | None, keep: int, inputs: int) -> None:
        self.path, self.head = path, {"format": FORMAT, "keep": keep, "inputs": inputs}
        self.values: dict[str, dict[str, tuple[float, float]]] = {}
        if path is not None and os.path.exists(path):
            with open(path) as file:
                stored = json.load(file)
            if not isinstance(stored, dict) or {k: stored.get(k) for k in self.head} != self.head:
                raise ValueError(f"path: expected a search with keep {keep} on {inputs} inputs, got {os.fspath(path)}")
            self.values = {c: {n: (v[0], v[1]) for n, v in some.items()} for c, some in stored["seen"].items()}

    def has(self, candidate: Candidate, n: int) -> bool:
        return str(n) in self.values.get(candidate.key, {})

    def put(self, candidate: Candidate, n: int, value: tuple[float, float]) -> None:
        self.values.setdefault(candidate.key, {})[str(n)] = value

    def save(self) -> None:
        if self.path is not None:
            _write(self.path, {**self.head, "seen": self.values})

    def row(self, candidate: Candidate, upto: int) -> Row:
        some = [v for n, v in self.values.get(candidate.key, {}).items() if int(n) < upto]
        kl = [v[0] for v in some]
        mean = sum(kl) / len(kl)
        spread = math.sqrt(sum((v - mean) ** 2 for v in kl) / (len(kl) - 1)) if len(kl) > 1 else math.inf
        return Row(candidate, len(kl), mean, 1.96 * spread / math.sqrt(len(kl)), sum(v[1] for v in some) / len(some))
