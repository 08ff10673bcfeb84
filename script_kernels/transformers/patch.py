"""`script_pruning`: pruning inside `model.generate` and `model(...)`, for the code that opened the block alone.

What is pruned is a matter of the context (contextvars): threads and tasks that did not open the block, and those that
were started before it, are served as ever. A model's methods are wrapped once while any block on it is open, whoever
opened it, and put back when the last one closes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .families import family_of, parameters, unwrap
from .prune import PrunedInputs, consumed, has_pixels, prune_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHES = ("past_key_values", "cache")  # newer versions of transformers say cache
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@dataclass(eq=False)
class _Block:
    """One open `script_pruning`. `is_open` goes off for good when it is left, in whatever context."""

    model: PreTrainedModel
    keep: int | None
    arguments: dict[str, Any]
    last: SimpleNamespace
    is_open: bool = True


@dataclass
class _Turn:
    """What a cache that holds a pruned prompt stands for; kept on the cache, so that copies of it know too."""

    prompt: Tensor  # (B, S) as the caller passed it
    pruned: dict[str, Tensor]  # input_ids, attention_mask (B, S'), position_ids
    deltas: Tensor | None


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("script_pruning", default=())


def _innermost(model: PreTrainedModel) -> _Block | None:
    return next((b for b in reversed(_blocks.get()) if b.is_open and b.model is model), None)


class _Wrapper:
    """A model's method inside blocks, the original elsewhere."""

    def __init__(self, model: PreTrainedModel, name: str, inside: Callable[..., Any]) -> None:
        self.original = getattr(model, name)
        functools.update_wrapper(self, self.original)
        self.model, self.name, self.inside = model, name, inside
        self.saved = model.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = _innermost(self.model)
        if block is None:
            return self.original(*args, **kwargs)
        return self.inside(block, self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies of the model get the method as it was: no block is theirs, and none will put it back."""
        if self.saved is not None:
            return copy.deepcopy(self.saved, memo)
        owner = memo.get(id(self.model), self.model)
        return MethodType(getattr(type(owner), self.name), owner)


@dataclass
class _Patch:
    wrappers: dict[str, _Wrapper]
    deltas: Any
    blocks: int = 0


_lock = threading.Lock()
_patches: weakref.WeakKeyDictionary[PreTrainedModel, _Patch] = weakref.WeakKeyDictionary()


def _install(model: PreTrainedModel) -> None:
    with _lock:
        patch = _patches.get(model)
        if patch is None:
            insides = {"generate": _generate, "forward": _forward} | {
                name: functools.partial(_refuse_batching, name) for name in _BATCHING
            }
            wrappers = {name: _Wrapper(model, name, f) for name, f in insides.items() if hasattr(model, name)}
            patch = _patches[model] = _Patch(wrappers, getattr(model.base_model, "rope_deltas", None))
            for name, wrapper in wrappers.items():
                setattr(model, name, wrapper)
        patch.blocks += 1


def _remove(model: PreTrainedModel) -> None:
    with _lock:
        patch = _patches[model]
        patch.blocks -= 1
        if patch.blocks:
            return
        del _patches[model]
        for name, wrapper in patch.wrappers.items():
            if model.__dict__.get(name) is not wrapper:
                continue  # somebody wrapped the wrapper, which passes everything on from now
            if wrapper.saved is None:
                del model.__dict__[name]
            else:
                setattr(model, name, wrapper.saved)
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = patch.deltas


@contextmanager
def script_pruning(model: PreTrainedModel, keep: int | None = None, **arguments: Any) -> Iterator[SimpleNamespace]:
    """Prunes visual tokens in every `model.generate(**inputs)` and `model(**inputs)` of the block.

    Takes the arguments of `prune_inputs`. Calls without pixels pass unchanged. `generate` returns the prompt as it was
    passed, followed by the new tokens; `model(**inputs)` returns logits of the pruned prompt. A later turn passes the
    whole conversation and the cache of the turn before, inside the block, as ever.

    The block prunes for the thread or task that opened it, and for tasks started inside it; other threads call the
    model unpruned (`contextvars.copy_context().run` takes the block along). Blocks may nest and be left in any order:
    the innermost open one counts, and when the last one is left, also by an error, the model is as it was.

    Yields:
        A namespace with `stats`, `keep_indices` and `scores` of the last pruned call (None before it).

    Raises:
        What `prune_inputs` raises; ValueError for new images on a filled cache, for a conversation that does not begin
        with the prompt that the cache stands for, for use_cache=False with positions="original" on a model with 1-D
        positions, which `generate` would take for packed sequences, and for continuous batching.
    """
    model = unwrap(model)
    family_of(model)
    last = SimpleNamespace(stats=None, keep_indices=None, scores=None)
    block = _Block(model, keep, arguments, last)
    _install(model)
    _blocks.set((*_blocks.get(), block))
    try:
        yield last
    finally:
        block.is_open = False
        _blocks.set(tuple(b for b in _blocks.get() if b is not block))
        _remove(model)


def _refuse_batching(name: str, block: _Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{name}: expected generate or prune_inputs inside script_pruning, as continuous batching takes ids alone and "
        "no encoded images, got a call"
    )


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


def _turn(cache: Any) -> _Turn | None:
    return getattr(cache, "script_turn", None) if cache is not None and cache.get_seq_length() else None


def _remember(turn: _Turn, *places: Any) -> None:
    for place in places:
        for name in _CACHES:
            cache = place.get(name) if hasattr(place, "get") else None
            if cache is not None:
                cache.script_turn = turn


def _prune_call(block: _Block, kwargs: dict[str, Any]) -> tuple[PrunedInputs, _Turn]:
    """Takes what pruning replaces out of a call's arguments."""
    cache = _cache(kwargs)
    if cache is not None and cache.get_seq_length():
        raise ValueError("past_key_values: expected none or an empty cache with new images, got a filled one")
    if kwargs.get("position_ids") is not None:
        raise ValueError("position_ids: expected None, as pruning computes them, got a tensor")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: expected input_ids with pixels, as placeholders are found in them, got both")
    keys = consumed(block.model)
    prompt = kwargs.get("input_ids")
    taken = {key: kwargs.pop(key) for key in list(kwargs) if key in keys}
    pruned = prune_inputs(block.model, taken, block.keep, **block.arguments)
    last = block.last
    last.stats, last.keep_indices, last.scores = pruned.stats, pruned.keep_indices, pruned.scores
    assert prompt is not None
    parts = {name: pruned[name] for name in ("input_ids", "attention_mask", "position_ids")}
    mrope = family_of(block.model).has_mrope(block.model)
    return pruned, _Turn(prompt, parts, block.model.base_model.rope_deltas if mrope else None)


def _shift_lengths(kwargs: dict[str, Any], config: Any, by: int) -> None:
    """Lengths that count the prompt, unlike max_new_tokens, follow the prompt."""
    for bound in ("max", "min"):
        limit = kwargs.get(f"{bound}_length", getattr(config, f"{bound}_length"))
        new = kwargs.get(f"{bound}_new_tokens", getattr(config, f"{bound}_new_tokens"))
        if limit and new is None:
            kwargs[f"{bound}_length"] = max(0, limit - by)


def _restored(out: Any, prompt: Tensor, length: int) -> Any:
    """Generated sequences behind the prompt that the caller passed, for callers that cut it off by its length."""
    sequences = out if isinstance(out, Tensor) else out["sequences"]
    full = torch.cat([prompt.repeat_interleave(len(sequences) // len(prompt), 0), sequences[:, length:]], 1)
    if isinstance(out, Tensor):
        return full
    out["sequences"] = full
    return out


def _check_chunks(kwargs: dict[str, Any], config: Any) -> None:
    from transformers.generation import utils

    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None and not hasattr(utils, "_slice_mm_encoder_output"):
        raise ValueError(
            "prefill_chunk_size: expected None with images, as this version of transformers gives every chunk all "
            f"features, got {size}"
        )


def _generate(
    block: _Block,
    original: Callable[..., Any],
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    model = block.model
    config = generation_config or kwargs.get("generation_config") or model.generation_config
    pixels = has_pixels(model, kwargs)
    turn = None if pixels else _turn(_cache(kwargs))
    if not pixels and turn is None:
        return original(inputs, generation_config, *args, **kwargs)
    if inputs is not None:
        kwargs["input_ids"] = inputs
    if turn is not None:
        return _go_on(turn, config, functools.partial(original, None, generation_config, *args), kwargs)
    uses_cache = kwargs.get("use_cache", config.use_cache)
    mrope = family_of(model).has_mrope(model)
    if uses_cache is False and block.arguments.get("positions") == "original" and not mrope:
        raise ValueError("use_cache: expected True with positions='original' on a 1-D model, got False")
    _check_chunks(kwargs, config)
    pruned, turn = _prune_call(block, kwargs)
    length = pruned["input_ids"].shape[1]
    _shift_lengths(kwargs, config, turn.prompt.shape[1] - length)
    out = original(None, generation_config, *args, **pruned, **kwargs)
    _remember(turn, kwargs, out)
    return _restored(out, turn.prompt, length)


def _tail_mask(ids: Tensor, mask: Tensor | None, length: int, config: Any) -> Tensor:
    """Which tokens behind the prompt count: the caller's mask, or as `generate` infers it."""
    tail = ids[:, length:]
    if mask is not None and mask.shape == ids.shape:
        return mask[:, length:]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(tail)
    return (tail != config.pad_token_id).to(tail.dtype)


def _extended(turn: _Turn, rows: int, tail: Tensor) -> dict[str, Tensor]:
    """The pruned prompt's inputs, one row per sequence, with `tail` (rows, T) as the mask of what follows it."""
    pruned = turn.pruned
    times = rows // len(turn.prompt)
    positions = pruned["position_ids"].repeat_interleave(times, -2)
    steps = tail.long().cumsum(-1).to(positions.device)
    mask = pruned["attention_mask"].repeat_interleave(times, 0)
    return {
        "input_ids": pruned["input_ids"].repeat_interleave(times, 0),
        "attention_mask": torch.cat([mask, tail.to(mask)], 1),
        "position_ids": torch.cat([positions, positions[..., -1:] + steps], -1),
    }


def _go_on(turn: _Turn, config: Any, generate: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A later turn: the caller's whole conversation, with the prompt as the cache holds it."""
    ids, length = kwargs.get("input_ids"), turn.prompt.shape[1]
    rows = 0 if ids is None else len(ids)
    prompt = turn.prompt.repeat_interleave(max(1, rows // len(turn.prompt)), 0)
    if ids is None or ids.shape[1] <= length or len(prompt) != rows or not torch.equal(ids[:, :length], prompt):
        raise ValueError(
            f"input_ids: expected the conversation from its start, the {length} tokens of the prompt that "
            f"past_key_values holds pruned and what follows, got {None if ids is None else tuple(ids.shape)}"
        )
    if kwargs.get("position_ids") is not None:
        raise ValueError("position_ids: expected None, as they go on from the pruned prompt, got a tensor")
    tail = _tail_mask(ids, kwargs.get("attention_mask"), length, config)
    pruned = _extended(turn, rows, tail)
    short = pruned["input_ids"].shape[1]
    kwargs |= pruned | {"input_ids": torch.cat([pruned["input_ids"], ids[:, length:]], 1)}
    _shift_lengths(kwargs, config, length - short)
    out = generate(**kwargs)
    _remember(turn, kwargs, out)
    return _restored(out, prompt, short)


def _forward(block: _Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = block.model
    if args:
        kwargs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
    if has_pixels(model, kwargs):
        pruned, turn = _prune_call(block, kwargs)
        out = original(**pruned, **kwargs)
        _remember(turn, kwargs, out)
        return out
    known = _turn(_cache(kwargs))
    if known is not None:
        kwargs |= _next_step(model, known, kwargs)
    return original(**kwargs)


def _next_step(model: PreTrainedModel, turn: _Turn, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a loop over `model(...)` leaves out, or counts from the unpruned prompt."""
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None or "position_ids" not in parameters(type(model).forward):
        return {}
    full, short = turn.prompt.shape[1], turn.pruned["input_ids"].shape[1]
    total = _cache(kwargs).get_seq_length() + tokens.shape[1]
    mask = kwargs.get("attention_mask")
    changes: dict[str, Any] = {}
    tail = torch.ones(len(tokens), total - short, dtype=torch.long, device=tokens.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape[1] == total + full - short:
            tail = mask[:, full:]
            changes["attention_mask"] = _extended(turn, len(tokens), tail)["attention_mask"]
        elif mask.shape[1] == total:
            tail = mask[:, short:]
    elif mask is None:
        changes["attention_mask"] = _extended(turn, len(tokens), tail)["attention_mask"]
    if kwargs.get("position_ids") is None:
        changes["position_ids"] = _extended(turn, len(tokens), tail)["position_ids"][..., -tokens.shape[1] :]
        if turn.deltas is not None:
            model.base_model.rope_deltas = turn.deltas
    return changes
