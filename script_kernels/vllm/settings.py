"""What to keep of each image: read from the environment, the engine's arguments and a request, and checked.

Each setting has one name, `script_keep` and so on among vLLM's `mm_processor_kwargs`, in capitals in the environment
(`SCRIPT_KEEP`). A request's value goes before the engine's, and that before the environment's. Needs neither PyTorch
nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..options import COMBINE, PruneOptions

PREFIX = "script_"
BUDGET = ("keep", "keep_ratio")
OPTIONS = tuple(option.name for option in fields(PruneOptions))
NAMES = (*BUDGET, "query", *OPTIONS)


def is_setting(name: str) -> bool:
    """Whether a processor keyword is one of ours, or was meant to be."""
    return name.startswith(PREFIX)


def without_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The processor keywords that are not ours."""
    return {name: value for name, value in kwargs.items() if not is_setting(name)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to keep of each image. Neither `keep` nor `keep_ratio`: pruning is off.

    keep: tokens that stay of an image; one that has fewer stays whole. keep_ratio: instead, the share that stays, in
    (0, 1], rounded up. query: None, or "text": the user's words, which then belong to the image's cache identity.
    options: of `script_kernels.prune`.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    query: str | None = None
    options: PruneOptions = field(default_factory=PruneOptions)

    def __post_init__(self) -> None:
        keep, ratio = self.keep, self.keep_ratio
        if keep is not None and ratio is not None:
            raise ValueError(f"script_keep: expected either script_keep or script_keep_ratio, got {keep} and {ratio}")
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise ValueError(f"script_keep: expected an int >= 1, got {keep!r}")
        if ratio is not None and (not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio <= 1):
            raise ValueError(f"script_keep_ratio: expected a number in (0, 1], got {ratio!r}")
        if self.query not in (None, "text"):
            raise ValueError(f"script_query: expected 'text' or None, got {self.query!r}")
        try:
            self.options.check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{PREFIX}{error}") from None

    @property
    def on(self) -> bool:
        return self.keep is not None or self.keep_ratio is not None

    def updated(self, kwargs: Mapping[str, Any]) -> Settings:
        """These settings, with those of ours among `kwargs` in their place. A new budget replaces the old one."""
        given = {name.removeprefix(PREFIX): value for name, value in kwargs.items() if is_setting(name)}
        if not given:
            return self
        unknown = sorted(set(given) - set(NAMES))
        if unknown:
            names = ", ".join(PREFIX + name for name in NAMES)
            raise ValueError(f"{PREFIX}{unknown[0]}: expected one of {names}, got {PREFIX}{unknown[0]}")
        values = {"keep": self.keep, "keep_ratio": self.keep_ratio, "query": self.query}
        if any(name in given for name in BUDGET):
            values |= dict.fromkeys(BUDGET)
        values |= {name: value for name, value in given.items() if name in values}
        if values["query"] in ("", "none"):
            values["query"] = None
        options = asdict(self.options) | {name: value for name, value in given.items() if name in OPTIONS}
        return Settings(**values, options=PruneOptions(**options))  # type: ignore[arg-type]

    def kept(self, tokens: int) -> int:
        """How many of an image's `tokens` stay: a function of these two alone."""
        if not self.on:
            return tokens
        # 1e-9 takes off rounding such as 0.1 * 30 = 3.0000000000000004.
        asked = self.keep if self.keep_ratio is None else math.ceil(self.keep_ratio * tokens - 1e-9)
        return min(tokens, max(1, asked or 1))

    def placeholders(self, tokens: int, newlines: int = 0) -> int:
        """Placeholders of an image of `tokens` rows of which `newlines` hold no image content.

        Newline rows do not compete. They stay with an image that stays whole, and go with the first token that goes.
        """
        content = tokens - newlines
        kept = self.kept(content)
        if kept == content:
            return tokens
        try:
            self.options.check_drop(content)
        except ValueError as error:
            raise ValueError(f"{PREFIX}{error}") from None
        return kept

    def identity(self, query: tuple[int, ...] = ()) -> str:
        """A prefix for the cache identity of an image: equal exactly for what chooses equally."""
        named = f"keep{self.keep}" if self.keep_ratio is None else f"ratio{self.keep_ratio:g}"
        whole = json.dumps([asdict(self), list(query)], sort_keys=True)
        return f"script-{named}-{hashlib.sha256(whole.encode()).hexdigest()[:32]}-"


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings that SCRIPT_KEEP, SCRIPT_KEEP_RATIO, SCRIPT_QUERY, SCRIPT_GSP_DROP ... give; off without any."""
    given: dict[str, Any] = {}
    for name in NAMES:
        text = environment.get((PREFIX + name).upper())
        if text is not None:
            try:
                given[PREFIX + name] = json.loads(text)
            except ValueError:
                given[PREFIX + name] = text
    return Settings().updated(given)


@dataclass(frozen=True)
class Order:
    """What the processor tells the model about one image, as one row of numbers.

    before: rows that the encoder will give. after: placeholders in the prompt; 0 where the image is left alone.
    newlines: rows that do not compete.
    """

    before: int
    after: int
    newlines: int
    options: PruneOptions

    def pack(self) -> list[float]:
        values = [self.before, self.after, self.newlines]
        for name in OPTIONS:
            value = getattr(self.options, name)
            values.append(COMBINE.index(value) if name == "combine" else value)
        return [float(value) for value in values]

    @staticmethod
    def unpack(row: list[float]) -> Order:
        options: dict[str, Any] = dict(zip(OPTIONS, row[3:], strict=True))
        options |= {
            "combine": COMBINE[int(options["combine"])],
            "negate": bool(options["negate"]),
            "min_degree": int(options["min_degree"]),
            "rounds": int(options["rounds"]),
        }
        before, after, newlines = (int(value) for value in row[:3])
        return Order(before, after, newlines, PruneOptions(**options))
