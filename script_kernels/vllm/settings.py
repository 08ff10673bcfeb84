"""What to keep of each image and by which rule: read from the environment, the engine's arguments and a request.

Each setting has one name, `script_keep` and so on among vLLM's `mm_processor_kwargs`, in capitals in the environment
(`SCRIPT_KEEP`). A request's value goes before the engine's, and that before the environment's. Needs no vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from typing import Any

from ..options import REDUCE_BY_METHODS, PruneOptions, check_split, count

PREFIX = "script_"
BUDGET = ("keep", "keep_ratio")
OWN = (*BUDGET, "query", "method", "reduce")
# Of these two the method's own and the relevance's are taken.
OPTIONS = tuple(option.name for option in fields(PruneOptions) if option.name not in ("power", "reduce"))


def is_setting(name: str) -> bool:
    """Whether a processor keyword is one of ours, or was meant to be."""
    return name.startswith(PREFIX)


def without_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The processor keywords that are not ours."""
    return {name: value for name, value in kwargs.items() if not is_setting(name)}


@cache
def defaults_of(method: str | None) -> Mapping[str, Any]:
    """The options that a method takes, with their defaults; None: of either that it stands for."""
    from .. import methods

    return methods.options_of(method)


@dataclass(frozen=True)
class Rule:
    """How the rows of an image are chosen: a method, all its options, and how relevance is reduced over words."""

    method: str
    reduce: str
    options: tuple[tuple[str, Any], ...]

    @property
    def fused(self) -> PruneOptions | None:
        """The options of the op that does it all in one call, or None where it takes a method of its own."""
        options = dict(self.options)
        own = self.method == "script" and self.reduce == "mean" and set(options) <= set(OPTIONS)
        return PruneOptions(**options) if own and options["combine"] != "union" else None

    def check(self) -> None:
        """Raises ValueError, naming the first option that cannot be."""
        options = dict(self.options)
        try:
            negate = options.pop("negate")
            if not isinstance(negate, bool):
                raise TypeError(f"negate: expected a bool, got {negate!r}")
            if self.fused is not None:
                self.fused.check()
                return
            import torch

            from .. import methods

            if options.get("grid_width") is not None:  # whether it fits an image is known when there is one
                width = count(options["grid_width"], "grid_width", 1)
                check_split(width, options["split"], width)
                options["grid_width"] = 1
            # The method's own checks, on an image of one token.
            methods.select(torch.ones(1, 1, 1), torch.ones(1, 1), 1, method=self.method, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{PREFIX}{error}") from None

    def check_image(self, tokens: int, keep: int) -> None:
        """Raises ValueError where the rule cannot get from so many tokens to `keep`."""
        options = dict(self.options)
        if options.get("grid_width") is not None:
            try:
                check_split(tokens, options["split"], options["grid_width"])
            except ValueError as error:
                raise ValueError(f"{PREFIX}{error}") from None
        if self.method != "script":
            return
        given = {name: value for name, value in options.items() if name in OPTIONS}
        # These two take as many rounds as they need, and leave enough.
        if given["combine"] == "union" or options.get("survivors") is not None:
            return
        own = PruneOptions(**given)
        try:
            own.check_drop(tokens, keep)
            if self.fused is None and given["combine"] == "restrict" and own.gsp_keep(tokens) < keep:
                raise ValueError(f"combine: expected 'intersect' for {keep} of {tokens} tokens, got 'restrict'")
        except ValueError as error:
            raise ValueError(f"{PREFIX}{error}") from None

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=256)  # requests may come with any number of rules
    def parse(text: str) -> Rule:
        read = json.loads(text)
        return Rule(read["method"], read["reduce"], tuple((name, value) for name, value in read["options"]))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to keep of each image. Neither `keep` nor `keep_ratio`: pruning is off.

    keep: tokens that stay of an image; one that has fewer stays whole. keep_ratio: instead, the share that stays, in
    (0, 1], rounded up. query: None, or "text": the user's words, which then belong to the image's cache identity, if
    the method looks at them. method: a name of `script_kernels.methods`; None: with a question "focus", unless an
    option is given that "script" alone has, without one "script". reduce: of the cosines to several words, "mean",
    "max" or "above" their median over the image. options: those of the method that were given.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    query: str | None = None
    method: str | None = None
    reduce: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

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
        if self.reduce is not None and self.reduce not in REDUCE_BY_METHODS:
            raise ValueError(f"script_reduce: expected 'mean', 'max' or 'above', got {self.reduce!r}")
        known = method_names()
        if self.method is not None and self.method not in known:
            raise ValueError(f"script_method: expected one of {', '.join(known)}, got {self.method!r}")
        taken = defaults_of(self.method)
        unknown = sorted(set(self.options) - set(taken))
        if unknown:
            names = ", ".join(PREFIX + name for name in (*OWN, *taken))
            by = "" if self.method is None else f" with script_method={self.method}"
            by = by if any(unknown[0] in defaults_of(name) for name in known) else ""
            raise ValueError(f"{PREFIX}{unknown[0]}: expected one of {names}{by}, got {PREFIX}{unknown[0]}")
        try:
            rule = self.rule
        except TypeError as error:  # options of two methods
            raise ValueError(f"{PREFIX}{error}") from None
        rule.check()

    @property
    def rule(self) -> Rule:
        """What chooses, with defaults filled in, so that two of them are equal where they choose equally."""
        method, given, reduce = settled(self.method, self.options, self.reduce, self.asks)
        options = {**defaults_of(method), **given}
        if method == "script":
            # Knobs that stand where the op has them need no method of their own.
            defaults = defaults_of("script")
            knobs = [name for name in options if name not in OPTIONS]
            if all(options[name] == defaults[name] and type(options[name]) is not bool for name in knobs):
                options = {name: options[name] for name in OPTIONS}
        return Rule(method, reduce if self.asks else "mean", tuple(sorted(options.items())))

    @property
    def asks(self) -> bool:
        """Whether the choice depends on the question: a method that looks at no relevance is spared it."""
        return self.query == "text" and (self.method is None or needs_relevance(self.method))

    def check_complete(self, encoder_only: bool = False) -> None:
        """Raises ValueError where there is nothing to choose by: what the environment leaves open an argument may say.

        encoder_only: the engine has no language model, and so no embeddings of words.
        """
        if self.on and encoder_only and self.asks:
            raise ValueError(
                "script_query: expected None where the encoder runs without the language model, got 'text'"
            )
        if self.on and self.method == "relevance" and not self.asks:
            raise ValueError("script_method: expected one that works without script_query=text, got 'relevance'")

    @property
    def on(self) -> bool:
        return self.keep is not None or self.keep_ratio is not None

    def updated(self, kwargs: Mapping[str, Any]) -> Settings:
        """These settings, with those of ours among `kwargs` in their place. A new budget replaces the old one."""
        given = {name.removeprefix(PREFIX): value for name, value in kwargs.items() if is_setting(name)}
        if not given:
            return self
        values = {name: getattr(self, name) for name in OWN}
        if any(name in given for name in BUDGET):
            values |= dict.fromkeys(BUDGET)
        values |= {name: value for name, value in given.items() if name in values}
        if values["query"] in ("", "none"):
            values["query"] = None
        options = {**self.options, **{name: value for name, value in given.items() if name not in OWN}}
        # None takes back what was set before.
        options = {name: value for name, value in options.items() if value is not None}
        return Settings(**values, options=options)

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
        self.rule.check_image(content, kept)
        return kept

    def identity(self, query: tuple[int, ...] = ()) -> str:
        """A prefix for the cache identity of an image: equal exactly for what chooses equally."""
        named = f"keep{self.keep}" if self.keep_ratio is None else f"ratio{self.keep_ratio:g}"
        by = "" if self.method in (None, "script") else f"-{self.method}"
        whole = json.dumps([self.keep, self.keep_ratio, self.asks, self.rule.text(), list(query)])
        return f"script-{named}{by}-{hashlib.sha256(whole.encode()).hexdigest()[:32]}-"


def settled(
    method: str | None, options: Mapping[str, Any], reduce: str | None, asked: bool
) -> tuple[str, dict[str, Any], str]:
    from .. import methods

    found = methods.settled(method, options, reduce, asked)
    assert isinstance(found.method, str)
    return found.method, found.options, found.reduce


def method_names() -> tuple[str, ...]:
    from .. import methods

    return tuple(methods.METHODS)


def needs_relevance(method: str) -> bool:
    from .. import methods

    return method in methods.NEEDS_RELEVANCE


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings that SCRIPT_KEEP, SCRIPT_KEEP_RATIO, SCRIPT_QUERY, SCRIPT_METHOD ... give; off without any.

    Of the options only those of the method that is named there, or of the default one: SCRIPT_SEED means something to
    others too.
    """
    method = environment.get("SCRIPT_METHOD")
    options = defaults_of(method) if method is None or method in method_names() else ()
    given: dict[str, Any] = {}
    for name in (*OWN, *options):
        text = environment.get((PREFIX + name).upper())
        if text is not None:
            try:
                given[PREFIX + name] = json.loads(text)
            except ValueError:
                given[PREFIX + name] = text
    return Settings().updated(given)


def engine_settings(model_config: Any) -> Settings:
    """The environment's settings with the engine's arguments over them."""
    multimodal = model_config.get_multimodal_config()
    settings = from_environment().updated(multimodal.mm_processor_kwargs or {})
    settings.check_complete(getattr(multimodal, "mm_encoder_only", False))
    return settings


@dataclass(frozen=True)
class Order:
    """What the processor tells the model about one image, as one row of integers.

    before: rows that the encoder will give. after: placeholders in the prompt; 0 where the image is left alone.
    newlines: rows that do not compete. rule: how the others are chosen.
    """

    before: int
    after: int
    newlines: int
    rule: Rule

    def pack(self) -> list[int]:
        return [self.before, self.after, self.newlines, *self.rule.text().encode()]

    @staticmethod
    def unpack(row: list[int]) -> Order:
        before, after, newlines, *text = row
        return Order(before, after, newlines, Rule.parse(bytes(text).decode()))
