"""Selection rules by name, on the ops: which tokens to keep, by this package's method and by others'.

Every method has one signature, `method(tokens, relevance, keep, **options) -> kept`: tokens (B, N, D) in float32,
bfloat16 or float16, relevance (B, N) float32 or None (None: every token is as relevant as any other), and (B, keep)
int64 indices, ascending and distinct. CPU and CUDA; nothing is random but `random`, which has a seed. A token that
holds a NaN or an Inf goes last, except by `stride` and `random`, which look at no values, by `gsp` and `tome_drop`,
which keep every destination of a round, and by `released_script`.

    kept = script_kernels.methods.select(tokens, relevance, keep=64, method="divprune")

`select` also takes a callable of that signature, and checks what it returns. docs/methods.md has formulas and sources.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ..options import GspOptions, PruneOptions
from ._common import check, relevance_of
from .diverse import divprune, mmr
from .dpp import cdpruner, dpp, otprune, resprune, script
from .focus import focus
from .simple import dart, gsp, random, released_script, relevance, stride, tome_drop

__all__ = ["METHODS", "NEEDS_RELEVANCE", "Method", "facts_of", "get", "options_of", "relevance_of", "select", "settled"]

Method = Callable[..., torch.Tensor]

METHODS: dict[str, Method] = {
    "script": script,
    "focus": focus,
    "cdpruner": cdpruner,
    "dpp": dpp,
    "resprune": resprune,
    "otprune": otprune,
    "divprune": divprune,
    "mmr": mmr,
    "relevance": relevance,
    "gsp": gsp,
    "tome_drop": tome_drop,
    "dart": dart,
    "stride": stride,
    "random": random,
    "released_script": released_script,
}
# The others do the same whatever the question; they may be given a relevance, and leave it alone.
NEEDS_RELEVANCE = frozenset({"script", "focus", "cdpruner", "resprune", "mmr", "relevance", "released_script"})


def get(method: str | Method) -> Method:
    """The method of this name, or the callable itself.

    Raises:
        ValueError: no such name.
        TypeError: neither a name nor a callable.
    """
    if callable(method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: expected a name or a callable, got {type(method).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected a callable or one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


# What an integration knows of an image and tells a method that has such a keyword: no option of a user's.
FACTS = ("above", "grids")


def _keywords(method: Method) -> list[tuple[str, inspect.Parameter]]:
    return [(n, p) for n, p in inspect.signature(method).parameters.items() if p.kind is p.KEYWORD_ONLY]


def facts_of(method: str | Method) -> tuple[str, ...]:
    """Those of `FACTS` that a method of the package takes; a user's callable is told none."""
    return tuple(n for n, _ in _keywords(get(method)) if n in FACTS) if isinstance(method, str) else ()


def options_of(method: str | Method | None) -> dict[str, Any]:
    """Names and defaults of the options of a method of the package, and `negate`, which is the relevance's.

    None: those of "script" and of "focus", which a method left open stands for.

    Raises:
        ValueError, TypeError: what `get` raises.
    """
    if method is None:
        return {**options_of("script"), **options_of("focus")}
    chosen = get(method)
    own = {n: p.default for n, p in _keywords(chosen) if n not in FACTS}
    # These two hand theirs on to the ops.
    handed = {METHODS["gsp"]: GspOptions(), METHODS["script"]: PruneOptions()}.get(chosen)
    given = {} if handed is None else asdict(handed)
    given.pop("reduce", None)  # of the relevance that a method is given
    return {"negate": False, **given, **own}


# What the integrations do with the words of a question, as far as nothing is said of it: by the rule of docs/judge.md.
# "focus" gets to its last share as "script" does. With the ops' own defaults a relevance by words loses more answers
# than no question at all.
ASKED: dict[tuple[str, ...], dict[str, Any]] = {
    ("floor", "mix", "power"): {"floor": 0.3},
    ("combine", "gsp_drop", "oversample", "rounds", "survivors"): {"combine": "restrict", "survivors": 2.0},
}


class Settled(NamedTuple):
    """What an integration goes by, with nothing left open."""

    method: str | Method
    options: dict[str, Any]
    reduce: str


def settled(method: str | Method | None, options: Mapping[str, Any], reduce: str | None, asked: bool) -> Settled:
    """The method, its options and the reduction of a relevance that an integration uses.

    asked: whether there is a question. With one, a method left open is "focus", unless an option is given that only
    "script" has; without one it is "script". Open options are the method's own, but for "script" with a question.

    Raises:
        TypeError: options that no one of the two has together, where the method is open.
    """
    if method is None:
        both = ("focus", "script") if asked else ("script", "focus")
        fitting = [name for name in both if set(options) <= set(options_of(name))]
        if not fitting:
            raise TypeError(
                f"options: expected those of 'focus' or of 'script' alone, got {', '.join(sorted(options))}"
            )
        method = fitting[0]
    found = dict(options)
    if method == "focus" and asked:
        return Settled(method, found, reduce or "max")
    if method != "script" or not asked:
        return Settled(method, found, reduce or "mean")
    for names, chosen in ASKED.items():
        if not set(names) & set(options):
            found |= chosen
    return Settled(method, found, reduce or "max")


def select(
    tokens: torch.Tensor,
    relevance: torch.Tensor | None,
    keep: int,
    *,
    method: str | Method = "script",
    **options: Any,
) -> torch.Tensor:
    """The indices that a method keeps, (B, keep) int64, ascending; a callable's result is checked and sorted.

    Args:
        tokens: (B, N, D).
        relevance: (B, N) float32, or None.
        keep: tokens to keep of each image.
        method: a name from `METHODS`, or a callable `(tokens, relevance, keep, **options) -> (B, keep) int64`.
        options: handed on to the method.

    Raises:
        ValueError, TypeError: arguments that do not fit, or a callable's result that is not `keep` distinct indices of
            the image's tokens.
    """
    chosen = get(method)
    if isinstance(method, str):
        return chosen(tokens, relevance, keep, **options)
    check(tokens, relevance, keep)
    return checked(chosen(tokens, relevance, keep, **options), tokens, keep)


def checked(kept: torch.Tensor, tokens: torch.Tensor, keep: int) -> torch.Tensor:
    """What a callable returned, ascending, once it is known to be `keep` distinct indices of each image's tokens."""
    B, N, _ = tokens.shape
    if not isinstance(kept, torch.Tensor) or kept.dtype not in (torch.int64, torch.int32):
        got = str(kept.dtype).removeprefix("torch.") if isinstance(kept, torch.Tensor) else type(kept).__name__
        raise TypeError(f"method: expected it to return an int64 tensor, got {got}")
    if kept.shape != (B, keep):
        raise ValueError(f"method: expected it to return shape ({B}, {keep}), got {tuple(kept.shape)}")
    if kept.device != tokens.device:
        raise ValueError(f"method: expected it to return indices on {tokens.device}, got {kept.device}")
    kept = kept.long().sort(1).values
    if B and (bool((kept < 0).any()) or bool((kept >= N).any())):
        raise ValueError(f"method: expected indices in 0..{N - 1}, got {int(kept.min())}..{int(kept.max())}")
    if bool((kept[:, 1:] == kept[:, :-1]).any()):
        raise ValueError("method: expected distinct indices, got one twice")
    return kept
