"""The options of GSP, QCSP and prune as one frozen value each: defaults, checks, and how many tokens each stage keeps.

Every face builds one from the keywords that its users write and hands it on whole. csrc/core/schedule.hpp computes the
same counts. Needs neither PyTorch nor NumPy.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMBINE = ("intersect", "restrict", "union")
REDUCE = ("mean", "max")
REDUCE_BY_METHODS = (*REDUCE, "above")  # what `methods.relevance_of` takes
SPLIT = ("raster", "checker")
Grids = Sequence[tuple[int, int]]  # rows and columns of what tokens fill line by line, one grid after the other
MOST_POWER = 64  # of a relevance: a larger one would leave nothing but the largest
# A round is a matching of all that is left. A hundred of them get to one token in a hundred; more would only be time.
MOST_ROUNDS = 100
# The method "focus": of the softmax over cosines (the patches of one thing are each other's like, and little else is);
# of all tokens, up to the first of which "script" alone chooses, and from the second on shares are whole; of a spread
# relevance's median within its range, up to the first of which it points at something, and from the second on nowhere.
WARMTH = 0.05
FEW, FULL = 1 / 18, 1 / 9
CLEAR, VAGUE = 0.125, 0.25
FEWEST = 16  # GSP stops at one token in so many, which takes it some 15 rounds; one in 500 would take 200
# No dimension of any argument is larger. Positions and counts are then exact in int32 and float32, and a view of stride
# 0, which may claim any size without having it, cannot ask for work without end.
MOST_SIZE = 2**24


def is_symbolic(value: object) -> bool:
    """A size or number of a program that is being traced: its value is not known, and asking would specialise it."""
    return type(value).__name__ in ("SymInt", "SymFloat")


def check_int(value: object, argument: str) -> None:
    """Raises TypeError unless the value is an int, or that of a traced program."""
    if not (isinstance(value, int) or type(value).__name__ == "SymInt") or isinstance(value, bool):
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")


def check_number(value: object, argument: str) -> None:
    """Raises TypeError unless the value is a float or an int, or that of a traced program."""
    if not (isinstance(value, (float, int)) or is_symbolic(value)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a float, got {type(value).__name__}")


def check_keeps(keep: object) -> None:
    """Raises unless `keep` is a sequence of counts; a tensor or an array is none."""
    if not isinstance(keep, Sequence):
        raise TypeError(f"keep: expected a sequence of ints, got {type(keep).__name__}")
    for s, kept in enumerate(keep):
        check_int(kept, f"keep[{s}]")
        if (kept >= 0) is False:
            raise ValueError(f"keep[{s}]: expected keep[{s}] >= 0, got {kept}")


def check_sizes(shape: Sequence[int], argument: str) -> None:
    """Raises ValueError where a dimension is larger than any argument's may be."""
    for size in shape:
        if (size <= MOST_SIZE) is False:
            raise ValueError(f"{argument}: expected sizes up to {MOST_SIZE}, got {tuple(shape)}")


def check_finite(value: float, argument: str) -> None:
    """Raises unless the value is a finite number."""
    check_number(value, argument)
    if not is_symbolic(value) and not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value}")


def check_share(value: float, argument: str) -> None:
    """Raises unless the value is a number from 0 to 1."""
    check_number(value, argument)
    if not is_symbolic(value) and not 0 <= value <= 1:
        raise ValueError(f"{argument}: expected 0 <= {argument} <= 1, got {value}")


def check_power(value: float) -> None:
    """Raises unless the value is a power that a relevance may be raised to."""
    check_number(value, "power")
    if not is_symbolic(value) and not 0 <= value <= MOST_POWER:
        raise ValueError(f"power: expected 0 <= power <= {MOST_POWER}, got {value}")


def check_name(value: str, argument: str, names: Sequence[str]) -> None:
    """Raises unless the value is one of the names."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected a str, got {type(value).__name__}")
    if value not in names:
        *first, last = map(repr, names)
        raise ValueError(f"{argument}: expected {', '.join(first)} or {last}, got {value!r}")


def number(value: float, argument: str, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a float, once it is known to be finite and within the bounds."""
    check_finite(value, argument)
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected {low:g} <= {argument} <= {high:g}, got {value}")
    return float(value)


def count(value: int, argument: str, low: int) -> int:
    """The value, once it is known to be an int that is not too small."""
    check_int(value, argument)
    if value < low:
        raise ValueError(f"{argument}: expected {argument} >= {low}, got {value}")
    return value


def check_grids(grids: Grids, n: int) -> None:
    """Raises unless n tokens fill the grids, one after the other."""
    shape = "a sequence of (rows, columns)"
    if isinstance(grids, (str, bytes)) or not isinstance(grids, Sequence):
        raise TypeError(f"grids: expected {shape}, got {type(grids).__name__}")
    for one in grids:
        if not isinstance(one, (tuple, list)) or len(one) != 2:
            raise ValueError(f"grids: expected {shape}, got {one!r} in it")
        for size in one:
            check_int(size, "grids")
            if size < 1:
                raise ValueError(f"grids: expected rows and columns >= 1, got {tuple(one)}")
    held = sum(rows * columns for rows, columns in grids)
    if held != n:
        raise ValueError(f"grids: expected N = {n} tokens in them, got {held}")


def check_split(n: int, split: str, grid_width: int | None) -> None:
    """Raises unless n tokens can alternate as asked between GSP's sources and destinations."""
    check_name(split, "split", SPLIT)
    if split == "raster" and grid_width is None:
        return
    if split == "raster":
        raise ValueError(f"grid_width: expected it with split='checker' only, got {grid_width} with 'raster'")
    if grid_width is None:
        raise ValueError("grid_width: expected the tokens of a row of the grid with split='checker', got None")
    check_int(grid_width, "grid_width")
    if is_symbolic(n) or is_symbolic(grid_width):
        return
    if n % count(grid_width, "grid_width", 1):
        raise ValueError(f"grid_width: expected a divisor of N = {n}, the tokens of whole rows, got {grid_width}")


@dataclass(frozen=True, kw_only=True)
class QcspOptions:
    """What QCSP makes its kernel of: see `script_kernels.qcsp`."""

    power: float = 1.0
    normalize: bool = True
    ridge: float = 0.0

    def check(self) -> None:
        """Raises TypeError or ValueError, naming the first option that cannot be."""
        check_power(self.power)
        check_number(self.ridge, "ridge")
        if not is_symbolic(self.ridge) and not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge: expected a finite number >= 0, got {self.ridge}")


@dataclass(frozen=True, kw_only=True)
class GspOptions:
    """What GSP asks of its graph: see `script_kernels.gsp`."""

    threshold: float = 0.2
    gamma: float = 1.0
    min_degree: int = 4
    rounds: int = 1

    def check(self) -> None:
        """Raises TypeError or ValueError, naming the first option that cannot be."""
        check_finite(self.threshold, "threshold")
        check_finite(self.gamma, "gamma")
        check_int(self.min_degree, "min_degree")
        if (self.min_degree >= 0) is False:
            raise ValueError(f"min_degree: expected min_degree >= 0, got {self.min_degree}")
        check_int(self.rounds, "rounds")
        if (self.rounds >= 1) is False:
            raise ValueError(f"rounds: expected rounds >= 1, got {self.rounds}")
        if (self.rounds <= MOST_ROUNDS) is False:
            raise ValueError(f"rounds: expected rounds <= {MOST_ROUNDS}, got {self.rounds}")

    def check_reachable(self, n: int, keep: int, asked: str | None = None) -> None:
        """Raises ValueError, naming what was `asked` (default: `keep`), unless `rounds` rounds get from n to it."""
        if any(is_symbolic(value) for value in (n, keep, self.rounds)) or rounds_suffice(n, keep, self.rounds):
            return
        needed = rounds_needed(n, keep)
        way = f"; needs rounds >= {needed}" if needed <= MOST_ROUNDS else f", nor with any rounds <= {MOST_ROUNDS}"
        raise ValueError(
            f"{asked or f'keep: {keep}'} of N = {n} tokens cannot be reached with rounds = {self.rounds} "
            f"(a round drops at most half){way}"
        )


@dataclass(frozen=True, kw_only=True)
class PruneOptions(GspOptions):
    """What `prune` and `prune_varlen` leave to their callers: see `script_kernels.prune`."""

    negate: bool = False
    gsp_drop: float = 0.25
    oversample: float = 2.0
    combine: str = "intersect"
    floor: float = 0.0
    power: float = 1.0
    reduce: str = "mean"

    def check(self) -> None:
        """Raises TypeError or ValueError, naming the first option that cannot be."""
        check_number(self.gsp_drop, "gsp_drop")
        if not is_symbolic(self.gsp_drop) and not 0 <= self.gsp_drop < 1:
            raise ValueError(f"gsp_drop: expected 0 <= gsp_drop < 1, got {self.gsp_drop}")
        check_number(self.oversample, "oversample")
        if not is_symbolic(self.oversample) and not 1 <= self.oversample < math.inf:
            raise ValueError(f"oversample: expected a finite number >= 1, got {self.oversample}")
        check_name(self.combine, "combine", COMBINE)
        super().check()
        check_share(self.floor, "floor")
        check_power(self.power)
        check_name(self.reduce, "reduce", REDUCE)

    def check_drop(self, n: int, keep: int, argument: str = "keep") -> None:
        """Raises ValueError unless GSP's rounds get from n tokens to what it has to leave for `keep` of them."""
        if self.combine == "union":
            if not any(is_symbolic(value) for value in (n, keep, self.rounds)):
                share = union_share(keep)
                asked = f"{argument}: the half of {keep} that GSP keeps in a union, {share},"
                graph = GspOptions(rounds=max(self.rounds, min(rounds_needed(n, share), MOST_ROUNDS)))
                graph.check_reachable(n, share, asked)
        elif not is_symbolic(n) and not is_symbolic(self.gsp_drop):
            kept = self.gsp_keep(n)
            self.check_reachable(n, kept, f"gsp_drop: {self.gsp_drop} keeps {kept}, which")

    def check_segments(self, starts: Sequence[int], total: int, keep: Sequence[int]) -> None:
        """Raises ValueError unless `starts` splits `total` rows into segments of which `keep` can be kept."""
        if starts[0] != 0:
            raise ValueError(f"cu_seqlens: expected a start at 0, got {starts[0]}")
        for before, after in itertools.pairwise(starts):
            if after < before:
                raise ValueError(f"cu_seqlens: expected ascending values, got {after} after {before}")
        if starts[-1] != total:
            raise ValueError(f"cu_seqlens: expected an end at T = {total}, got {starts[-1]}")
        for s, kept in enumerate(keep):
            length = starts[s + 1] - starts[s]
            if length == 0:
                if kept != 0:
                    raise ValueError(f"keep[{s}]: expected 0 for an empty segment, got {kept}")
                continue
            if not 1 <= kept <= length:
                raise ValueError(f"keep[{s}]: expected 1 <= keep[{s}] <= {length}, the segment's length, got {kept}")
            self.check_drop(length, kept, f"keep[{s}]")

    def gsp_keep(self, n: int) -> int:
        """Tokens that GSP keeps of n."""
        return n - math.floor(self.gsp_drop * n)

    def survivors(self, n: int, keep: int) -> int:
        """Tokens that GSP keeps of n, for `keep` of them in the end."""
        return union_share(keep) if self.combine == "union" else self.gsp_keep(n)

    def rounds_to(self, n: int, keep: int) -> int:
        """The rounds of GSP: in a union as many as it takes, and no less than `rounds`."""
        return max(self.rounds, rounds_needed(n, union_share(keep))) if self.combine == "union" else self.rounds

    def ranked(self, n: int, keep: int) -> int:
        """Length of QCSP's ranking, for `keep` of n tokens."""
        return min(n, math.ceil(self.oversample * keep)) if self.combine == "intersect" else keep


@dataclass(frozen=True, kw_only=True)
class ImageOptions(PruneOptions):
    """What `prune` takes besides, whose images may be grids: see `script_kernels.prune`."""

    split: str = "raster"
    grid_width: int | None = None

    def check_grid(self, n: int) -> None:
        """Raises TypeError or ValueError unless n tokens can be split so."""
        check_split(n, self.split, self.grid_width)

    @property
    def checkered(self) -> int:
        """The grid's columns, where tokens have to change places: an odd width's squares of one colour are every other
        token anyway. Else 0."""
        columns = self.grid_width if self.split == "checker" else None
        return 0 if columns is None or columns % 2 else columns


def share_given(kept: float, least: float, most: float, typical: float, near: int) -> float:
    """How much of the shares of "focus" a budget of so many of all tokens is given; raises unless they are shares."""
    for value, name in ((least, "least"), (most, "most"), (typical, "typical")):
        check_share(value, name)
    if not least <= most <= 1 - typical:
        raise ValueError(f"most: expected least <= most <= 1 - typical, got {least}, {most} and {typical}")
    count(near, "near", 0)
    return min(max((kept - FEW) / (FULL - FEW), 0.0), 1.0)


def checker_order(place: Any, grid_width: int) -> Any:
    """Tokens by a place (a range, as an array or a tensor of ints): an order whose even places are GSP's first sources.

    In raster order of an even width these would be the even columns. With the pairs of every odd row swapped they are
    the squares of one colour of a checkerboard. The order is its own inverse.
    """
    return place ^ (place // grid_width % 2)  # swaps 2 i and 2 i + 1, which an even width has in one row


def survivors_of(n: int, keep: int, survivors: float) -> int:
    """Tokens of n that the method `script` has GSP leave: `survivors` times `keep`, and one in FEWEST at least."""
    return min(n, max(math.ceil(number(survivors, "survivors", 1.0) * keep), -(-n // FEWEST)))


def union_share(keep: int) -> int:
    """Tokens of `keep` that are GSP's in a union: half of them, rounded up."""
    return (keep + 1) // 2


def rounds_suffice(n: int, keep: int, rounds: int) -> bool:
    """Whether `rounds` rounds of GSP get from `n` tokens to `keep`: no round may drop more than its source tokens."""
    left = n - keep
    for r in range(rounds):
        if left == 0:
            break
        quota = -(-left // (rounds - r))
        if quota > (keep + left + 1) // 2:
            return False
        left -= quota
    return True


def rounds_needed(n: int, keep: int) -> int:
    """The smallest number of rounds that suffices, for 1 <= keep <= n; MOST_ROUNDS + 1 if none that is allowed does."""
    # The last round drops about left / rounds of at most 2 keep + 1 tokens, so fewer rounds than this cannot do.
    rounds = max(1, min((n - keep) // (keep + 2), MOST_ROUNDS + 1))
    while rounds <= MOST_ROUNDS and not rounds_suffice(n, keep, rounds):
        rounds += 1
    return rounds
