"""Visual-token pruning for Hugging Face transformers models: one call, no fork.

`prune_inputs` turns a processor's output into the inputs of the same model with fewer visual tokens;
`script_pruning` does it inside `model.generate`. Needs transformers >= 5.18.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .flops import flops_of_lengths, kv_cache_bytes, prefill_flops
from .models import (
    ADAPTERS,
    MROPE,
    PIXELS,
    Visual,
    check_model,
    encode,
    fetch,
    mark,
    milliseconds,
    rebuild,
    send,
    text_config,
    token_id,
)
from .positions import pruned_positions
from .query import text_query
from .select import Budget, choose, kept_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PruneStats", "PrunedInputs", "kv_cache_bytes", "prefill_flops", "prune_inputs", "script_pruning"]

# What processors of the supported models return, besides the pixels and the labels of a training set.
_KNOWN = {
    *("input_ids", "attention_mask", "labels", *PIXELS.values(), "image_sizes", "image_sizes_videos"),
    *("batch_num_images", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"),
    *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
}


@dataclass(frozen=True)
class PruneStats:
    """Cost of one call. Lists hold one entry per prompt; milliseconds are of the whole batch.

    visual_*: visual tokens. prompt_*: all tokens without padding. flops_*: the language model's prefill, counted from
    the config (None for mixture-of-experts models). vision_ms: the model's own encoder and projector. select_ms: query,
    scores and selection. prune_ms: all that pruning adds: checks, layout, select_ms, gather, positions. On a GPU its
    own clock counts: what the host does while the GPU is still encoding costs nothing.
    """

    visual_before: list[int]
    visual_after: list[int]
    prompt_before: list[int]
    prompt_after: list[int]
    flops_before: list[int | None]
    flops_after: list[int | None]
    vision_ms: float
    select_ms: float
    prune_ms: float


class PrunedInputs(UserDict):
    """Model inputs, ready for `model(**pruned)` or `model.generate(**pruned)`.

    Keys: input_ids, attention_mask, position_ids, mm_encoder_outputs (and labels, if they were given).
    keep_indices: per image, then per video, the kept rows of its features, ascending int64.
    scores: likewise (L,) fp32 relevance in [0, 1] of every row, NaN on newline rows, 1 without a query.
    stats: a `PruneStats`.
    """

    def __init__(self, data: dict[str, Any], keep_indices: list[Tensor], scores: list[Tensor], stats: PruneStats):
        super().__init__(data)
        self.keep_indices = keep_indices
        self.scores = scores
        self.stats = stats

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        # Beam search repeats the features inside the object it is given; a copy lets one result serve many calls.
        return {k: copy.copy(v) for k, v in value.items()} if key == "mm_encoder_outputs" else value


def _check_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs without None values and with a mask; and the same with all but the pixels on the CPU."""
    given = {key: value for key, value in inputs.items() if value is not None}
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise ValueError(f"inputs: expected what the model's processor returns, got also {', '.join(unknown)}")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"inputs: expected input_ids of shape (B, S), got {getattr(ids, 'shape', None)}")
    mask = given["attention_mask"] if "attention_mask" in given else torch.ones_like(ids)
    given["attention_mask"] = mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    name, _, modalities = ADAPTERS[model.config.model_type]
    for modality, pixels in PIXELS.items():
        if pixels in given and modality not in modalities:
            raise ValueError(f"{pixels}: expected none, as {name} takes no {modality} input, got some")
    if not any(pixels in given for pixels in PIXELS.values()):
        raise ValueError(f"inputs: expected {' or '.join(PIXELS[m] for m in modalities)}, got neither")
    return given, given | fetch({name: value for name, value in given.items() if name not in PIXELS.values()})


def _query(
    model: PreTrainedModel, query: Any, tokenizer: Any, prompt: int, ids: Tensor, mask: Tensor, like: Tensor
) -> Tensor | None:
    """The (1, Q, D) query of one prompt, in the features' dtype and on their device."""
    if query is None:
        return None
    if isinstance(query, str):
        if query not in ("text", "text_mean"):
            raise ValueError(f"query: expected 'text', 'text_mean', a tensor or None, got {query!r}")
        visual = {i for i in (token_id(model, modality) for modality in PIXELS) if i is not None}
        own = ids[prompt][mask[prompt].bool()]
        vectors = text_query(model, own, visual, mean=query == "text_mean", tokenizer=tokenizer)
    elif isinstance(query, Tensor):
        batch, width = len(ids), like.shape[-1]
        if (
            query.ndim not in (1, 2, 3)
            or query.shape[-1] != width
            or (query.ndim == 3 and len(query) not in (1, batch))
        ):
            raise ValueError(
                f"query: expected shape ({width},), (Q, {width}) or ({batch}, Q, {width}), got {tuple(query.shape)}"
            )
        vectors = query[prompt % len(query)] if query.ndim == 3 else query.reshape(-1, width)
    else:
        raise TypeError(f"query: expected 'text', 'text_mean', a tensor or None, got {type(query).__name__}")
    return send(vectors[None], like.device).to(like.dtype)


def _renumber(model: PreTrainedModel, positions: str | None) -> bool:
    mrope = model.config.model_type in MROPE
    if positions not in (None, "original", "renumber"):
        raise ValueError(f"positions: expected 'original', 'renumber' or None, got {positions!r}")
    renumber = positions == "renumber" or (positions is None and not mrope)
    attention = str(getattr(text_config(model), "_attn_implementation", ""))
    if not renumber and not mrope and "flash" in attention:
        raise ValueError(
            f"positions: expected 'renumber' with {attention}, which reads gaps in 1-D positions as packed sequences, "
            "got 'original'"
        )
    return renumber


def _pad_id(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> int:
    padding = ids[mask == 0]
    if len(padding):
        return int(padding[0])
    configs = (getattr(model, "generation_config", None), text_config(model))
    named = [getattr(c, name, None) for name in ("pad_token_id", "eos_token_id") for c in configs]
    named = [i[0] if isinstance(i, (list, tuple)) else i for i in named]
    placeholders = [token_id(model, modality) for modality in PIXELS]
    # Padding is masked, so that any id serves that is no placeholder.
    return next(i for i in (*named, *range(3)) if i is not None and i not in placeholders)


def _left_pad(rows: list[Tensor], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), length), value)
    for i, row in enumerate(rows):
        out[i, length - len(row) :] = row
    return out


def _kept_columns(mask: Tensor, visuals: list[Visual], kept: list[Tensor]) -> list[Tensor]:
    alive = (mask != 0).unbind()  # a tensor of its own, also for a boolean mask
    for visual, indices in zip(visuals, kept, strict=True):
        alive[visual.prompt].index_fill_(0, visual.columns, False)
        alive[visual.prompt].index_fill_(0, visual.columns[indices], True)
    return [row.nonzero()[:, 0] for row in alive]


def _counts(
    model: PreTrainedModel, mask: Tensor, visuals: list[Visual], kept: list[Tensor], columns: list[Tensor]
) -> dict[str, list[Any]]:
    """What `PruneStats` tells of each prompt."""
    before = [0] * len(mask)
    after = [0] * len(mask)
    for visual, indices in zip(visuals, kept, strict=True):
        before[visual.prompt] += len(visual.features)
        after[visual.prompt] += len(indices)
    full, short = mask.bool().sum(1).tolist(), [len(c) for c in columns]
    flops = flops_of_lengths(text_config(model), full + short)
    return {
        "visual_before": before,
        "visual_after": after,
        "prompt_before": full,
        "prompt_after": short,
        "flops_before": flops[: len(full)],
        "flops_after": flops[len(full) :],
    }


@torch.no_grad()
def prune_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    keep: int | None = None,
    *,
    keep_ratio: float | None = None,
    per: str = "image",
    query: str | Tensor | None = "text",
    tokenizer: Any = None,
    positions: str | None = None,
    min_tokens: int = 1,
    newlines: str = "drop",
    **options: Any,
) -> PrunedInputs:
    """Encodes the images (and videos) of a prompt batch, prunes their tokens and returns inputs for the same model.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2.5-VL or Qwen3-VL model of transformers.
        inputs: the processor's output: input_ids (B, S), attention_mask and the pixel and size entries. Prompts may
            be padded on either side; the result is padded on the left.
        keep: tokens that stay of each unit. A unit that has fewer stays whole.
        keep_ratio: instead of keep, the share of each unit's tokens that stays, in (0, 1], rounded up.
        per: the unit: "image" (each image or video, over all its tiles), "tile" (each any-resolution tile and the
            base view, each video frame) or "request" (all images and videos of a prompt together).
        query: "text" (embeddings of the user's words, one query vector each), "text_mean" (their mean), a tensor of
            shape (D,), (Q, D) or (B, Q, D) in the space of the projected features, or None (diversity alone).
        tokenizer: tokenizer or processor with a chat template, to find the user's words exactly; without one the
            template's words are left in (see `query.user_columns`).
        positions: "original" (tokens keep the positions of the full prompt), "renumber" (consecutive), or None:
            original for the mRoPE models (Qwen), renumber for the others.
        min_tokens: fewest tokens that stay of a unit.
        newlines: the `image_newline` rows of an image that lost tokens: "drop" all of them, or keep those of "lines"
            that still hold a token, on top of the budget. An image that stays whole keeps them.
        options: `negate`, `gsp_drop`, `oversample`, `combine`, `threshold`, `gamma`, `min_degree`, `rounds` of
            `script_kernels.prune`.

    Returns:
        A `PrunedInputs`. For mRoPE models `rope_deltas` of the model is set too, as its own prefill would do.

    Raises:
        TypeError: a model that is not supported, an unknown option, an argument of a wrong type.
        ValueError: a bad value, or inputs that do not fit each other.
    """
    check_model(model)
    device = next(model.parameters()).device
    start = mark(device)
    budget = Budget(keep, keep_ratio, per, min_tokens, newlines, options)
    renumber = _renumber(model, positions)
    given, host = _check_inputs(model, inputs)
    ids, mask = host["input_ids"], host["attention_mask"]
    visuals, outputs, vision = encode(model, given, ids, mask, host)

    select_start = mark(device)
    prompts = [[v for v in visuals if v.prompt == prompt] for prompt in range(len(ids))]
    choices = [
        choose(mine, _query(model, query, tokenizer, prompt, ids, mask, mine[0].features), budget)
        for prompt, mine in enumerate(prompts)
        if mine
    ]
    found = {
        id(visual): (indices, score)
        for choice, rows in zip(choices, kept_rows(choices, newlines), strict=True)
        for visual, indices, score in zip(choice.visuals, rows, choice.scores, strict=True)
    }
    kept, scores = ([found[id(v)][part] for v in visuals] for part in range(2))
    select_end = mark(device)

    features = rebuild(outputs, visuals, kept)  # first, so that the device gathers while the host goes on
    columns = _kept_columns(mask, visuals, kept)
    pruned_mask = _left_pad([mask.new_ones(len(c)) for c in columns], 0)
    position_ids, deltas = pruned_positions(model, host, pruned_mask, columns, renumber)
    ragged = len({len(c) for c in columns}) > 1
    pad_id = _pad_id(model, ids, mask) if ragged else 0
    pruned = {
        "input_ids": _left_pad([row[c] for row, c in zip(ids, columns, strict=True)], pad_id),
        "attention_mask": pruned_mask,
        "position_ids": position_ids,
    }
    if "labels" in given:
        pruned["labels"] = _left_pad([row[c] for row, c in zip(host["labels"], columns, strict=True)], -100)
    data = {name: send(value, given.get(name, given["attention_mask"]).device) for name, value in pruned.items()}
    if deltas is not None:
        model.base_model.rope_deltas = send(deltas, given["input_ids"].device)
    counts = _counts(model, mask, visuals, kept, columns)
    # The one wait for a time: whatever was queued above is done then.
    total_ms = milliseconds(start, mark(device))
    vision_ms = sum(milliseconds(*run) for run in vision)
    stats = PruneStats(
        **counts, vision_ms=vision_ms, select_ms=milliseconds(select_start, select_end), prune_ms=total_ms - vision_ms
    )
    return PrunedInputs(data | {"mm_encoder_outputs": features}, kept, scores, stats)


def _has_pixels(kwargs: Mapping[str, Any]) -> bool:
    return any(kwargs.get(pixels) is not None for pixels in PIXELS.values())


def _past_length(kwargs: Mapping[str, Any]) -> int:
    past = kwargs.get("past_key_values")
    return past.get_seq_length() if past is not None else 0


def _restore_prompt(sequences: Tensor, prompt: Tensor, pruned_length: int) -> Tensor:
    """Generated sequences behind the prompt that the caller passed, for callers that cut it off by its length."""
    return torch.cat([prompt.repeat_interleave(len(sequences) // len(prompt), 0), sequences[:, pruned_length:]], 1)


@contextmanager
def script_pruning(model: PreTrainedModel, keep: int | None = None, **arguments: Any) -> Iterator[SimpleNamespace]:
    """Prunes visual tokens in every `model.generate(**inputs)` and `model(**inputs)` of the block.

    Takes the arguments of `prune_inputs`. Calls without pixels pass unchanged. `generate` returns the prompt as it was
    passed, followed by the new tokens; `model(**inputs)` returns logits of the pruned prompt. On leaving, also by an
    error, the model is as it was.

    Yields:
        A namespace with `stats`, `keep_indices` and `scores` of the last pruned call (None before it).

    Raises:
        What `prune_inputs` raises; ValueError for a cache of an earlier turn, whose positions belong to a pruned prompt
        (call `prune_inputs` and go on from its sequences), and for use_cache=False with positions="original" on a
        model with 1-D positions, which `generate` would take for packed sequences.
    """
    model_type = check_model(model)
    last = SimpleNamespace(stats=None, keep_indices=None, scores=None)
    saved = {name: model.__dict__[name] for name in ("generate", "forward") if name in model.__dict__}
    deltas = getattr(model.base_model, "rope_deltas", None)
    original = {name: getattr(model, name) for name in ("generate", "forward") if hasattr(model, name)}

    def pruned_call(kwargs: dict[str, Any]) -> tuple[PrunedInputs, dict[str, Any]]:
        if _past_length(kwargs):
            raise ValueError("past_key_values: expected none or an empty cache with new images, got a filled one")
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: expected None, as pruning computes them, got a tensor")
        pruned = prune_inputs(model, {key: kwargs.pop(key) for key in list(kwargs) if key in _KNOWN}, keep, **arguments)
        last.stats, last.keep_indices, last.scores = pruned.stats, pruned.keep_indices, pruned.scores
        return pruned, kwargs

    if "generate" in original:

        @functools.wraps(original["generate"])
        def generate(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not _has_pixels(kwargs):
                return original["generate"](inputs, generation_config, *args, **kwargs)
            if inputs is not None:
                kwargs["input_ids"] = inputs
            config = generation_config or model.generation_config
            uses_cache = kwargs.get("use_cache", config.use_cache)
            if uses_cache is False and arguments.get("positions") == "original" and model_type not in MROPE:
                raise ValueError("use_cache: expected True with positions='original' on a 1-D model, got False")
            prompt = kwargs["input_ids"]
            pruned, kwargs = pruned_call(kwargs)
            length = pruned["input_ids"].shape[1]
            for bound in ("max", "min"):  # these lengths count the prompt, unlike max_new_tokens
                limit = kwargs.get(f"{bound}_length", getattr(config, f"{bound}_length"))
                new = kwargs.get(f"{bound}_new_tokens", getattr(config, f"{bound}_new_tokens"))
                if limit and new is None:
                    kwargs[f"{bound}_length"] = max(0, limit - prompt.shape[1] + length)
            out = original["generate"](None, generation_config, *args, **pruned, **kwargs)
            if isinstance(out, Tensor):
                return _restore_prompt(out, prompt, length)
            out["sequences"] = _restore_prompt(out["sequences"], prompt, length)
            return out

        model.generate = generate

    signature = inspect.signature(original["forward"])

    @functools.wraps(original["forward"])
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = {**signature.bind_partial(*args).arguments, **kwargs}
        if not _has_pixels(kwargs):
            return original["forward"](**kwargs)
        pruned, kwargs = pruned_call(kwargs)
        return original["forward"](**pruned, **kwargs)

    model.forward = forward
    try:
        yield last
    finally:
        for name in original:
            if name in saved:
                setattr(model, name, saved[name])
            else:
                del model.__dict__[name]
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = deltas
