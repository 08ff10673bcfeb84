"""`prune_inputs`: from a processor's output to the inputs of the same model with fewer visual tokens."""

from __future__ import annotations

import copy
import os
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from script_kernels import methods
from script_kernels.calibrate import Calibration

from .device import clock_of, fetch, mark, milliseconds, send
from .encode import encode, rebuild
from .families import ALONG, Family, family_of, parameters, text_config, token_id, unwrap
from .flops import flops_of_lengths
from .grids import grids_of
from .layouts import MODALITIES, Visual
from .positions import INPUT_OF, pruned_positions
from .query import text_query
from .select import Budget, choose, kept_rows, settings
from .selfcheck import check_family
from .versions import splits_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What processors return for the models' encoders and positions, though some models do not read it.
_SIZES = {
    *("image_sizes", "image_sizes_videos", "batch_num_images", "image_grid_thw", "video_grid_thw"),
    *("second_per_grid_ts", "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
}
_SWITCHES = {"self", "kwargs", "return_dict", "output_attentions", "output_hidden_states"}
# Inputs that say already what pruning finds out, and what to give instead.
_CONTRARY = {
    "inputs_embeds": "input_ids, in which the placeholders are found",
    "position_ids": "None, as pruning computes them",
    "mm_encoder_outputs": "pixels, which are encoded here",
    "past_key_values": "none, as pruning begins a prompt",
    "cache": "none, as pruning begins a prompt",
    "cache_position": "none, as pruning begins a prompt",
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


def consumed(model: PreTrainedModel) -> set[str]:
    """The inputs that pruning replaces: pixels, their sizes, and whatever has one entry per token."""
    keys = {"input_ids", "attention_mask", *ALONG, *_SIZES, *family_of(model).pixels.values()}
    for name in ("get_image_features", "get_video_features", "get_rope_index"):
        if hasattr(model.base_model, name):
            keys |= {INPUT_OF.get(key, key) for key in parameters(getattr(model.base_model, name))} - _SWITCHES
    return keys - set(_CONTRARY)


def has_pixels(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(pixels) is not None for pixels in family_of(model).pixels.values())


def _passes(model: PreTrainedModel, key: str) -> bool:
    """Whether an input that is none of pruning's is one of the model's forward or of generate."""
    config = getattr(model, "generation_config", None)
    generate = parameters(type(model).generate) if hasattr(type(model), "generate") else ()
    return key in parameters(type(model).forward) or key in generate or hasattr(config, key)


def _check_inputs(model: PreTrainedModel, family: Family, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The inputs without None values and with a mask; the same with all but the pixels on the CPU; those that pass."""
    given = {key: value for key, value in inputs.items() if value is not None}
    for key, instead in _CONTRARY.items():
        if key in given:
            raise ValueError(f"inputs: expected {instead}, got also {key}")
    taken = consumed(model)
    for modality in MODALITIES:
        pixels = family.pixels.get(modality)
        absent = pixels is None or not hasattr(model.base_model, f"get_{modality}_features")
        key = pixels or {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
        if absent and key in given:
            raise ValueError(f"{key}: expected none, as {family.name} takes no {modality} input, got some")
    if "input_features" in given and "audio_seqlens" in taken:
        raise ValueError("input_features: expected none, as positions among sound are not known here, got some")
    unknown = sorted(key for key in given if key not in taken and not _passes(model, key))
    if unknown:
        raise ValueError(f"inputs: expected what the model's processor returns, got also {', '.join(unknown)}")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"inputs: expected input_ids of shape (B, S), got {getattr(ids, 'shape', None)}")
    mask = given["attention_mask"] if "attention_mask" in given else torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    passed = {key: given.pop(key) for key in list(given) if key not in taken}
    given["attention_mask"] = mask
    for key in ALONG:
        if key in given and given[key].shape != ids.shape:
            raise ValueError(f"{key}: expected shape {tuple(ids.shape)}, got {tuple(given[key].shape)}")
    small = {name: value for name, value in given.items() if name not in family.pixels.values()}
    return given, given | fetch(small), passed


def _query(
    model: PreTrainedModel, query: Any, tokenizer: Any, prompt: int, ids: Tensor, mask: Tensor, like: Tensor
) -> Tensor | None:
    """The (1, Q, D) query of one prompt, in the features' dtype and on their device."""
    if query is None:
        return None
    if isinstance(query, str):
        if query not in ("text", "text_mean"):
            raise ValueError(f"query: expected 'text', 'text_mean', a tensor or None, got {query!r}")
        visual = {i for i in (token_id(model, modality) for modality in MODALITIES) if i is not None}
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
    mrope = family_of(model).has_mrope(model)
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
    placeholders = [token_id(model, modality) for modality in MODALITIES]
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


def _along(model: PreTrainedModel, family: Family, given: Mapping[str, Any], mrope: bool) -> list[str]:
    """The inputs of `ALONG` that the pruned call gets."""
    if family.along is not None:
        return [key for key in family.along if key in given]
    # mm_token_type_ids tell get_rope_index where images stand; with the positions worked out they have no reader.
    useless = {"mm_token_type_ids"} if mrope else set()
    names = parameters(type(model).forward)
    return [key for key in ALONG if key in given and key not in useless and (key in names or "kwargs" in names)]


def _assemble(
    model: PreTrainedModel,
    given: Mapping[str, Any],
    host: Mapping[str, Any],
    columns: list[Tensor],
    renumber: bool,
) -> tuple[dict[str, Any], Tensor | None]:
    """All inputs of the pruned call but the features, and the rope_deltas that decoding goes on from."""
    family = family_of(model)
    ids, mask = host["input_ids"], host["attention_mask"]
    pruned_mask = _left_pad([mask.new_ones(len(c)) for c in columns], 0)
    position_ids, deltas = pruned_positions(model, host, pruned_mask, columns, renumber)
    ragged = len({len(c) for c in columns}) > 1
    pruned = {
        "input_ids": _left_pad(
            [row[c] for row, c in zip(ids, columns, strict=True)], _pad_id(model, ids, mask) if ragged else 0
        ),
        "attention_mask": pruned_mask,
        "position_ids": position_ids,
    }
    for key in _along(model, family, given, deltas is not None):
        pruned[key] = _left_pad([row[c] for row, c in zip(host[key], columns, strict=True)], ALONG[key])
    data = {name: send(value, given.get(name, given["attention_mask"]).device) for name, value in pruned.items()}
    return data, deltas


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
    method: str | methods.Method | None = None,
    reduce: str | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    **options: Any,
) -> PrunedInputs:
    """Encodes the images (and videos) of a prompt batch, prunes their tokens and returns inputs for the same model.

    Args:
        model: a vision-language model of transformers that takes mm_encoder_outputs, also inside PEFT, torch.compile,
            DataParallel or a pipeline. Types that no `Family` names are checked on their first inputs: keeping
            everything must give the unpruned logits.
        inputs: the processor's output: input_ids (B, S), attention_mask and the pixel and size entries. Prompts may
            be padded on either side; the result is padded on the left. Without pixels they come back as they are;
            what else the model's forward or generate takes comes along.
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
        method: a name from `script_kernels.methods`, or a callable `(tokens (1, N, D), relevance (1, N) or None, keep,
            **options) -> (1, keep)`, which is called once for each unit and whose result is checked. None: with a query
            "focus", unless an option is given that "script" alone has; without one "script".
        reduce: relevance by the "mean" cosine of a token to the query's vectors, by the largest ("max"), or by the
            largest above the median of its vector's over the image ("above"). None: with a query "max" for "focus" and
            "script", else "mean".
        calibration: what a calibration found, or the file it is in: sets method, reduce and options, whether there is a
            query, and keep if neither keep nor keep_ratio is given.
        options: `negate`, and those of the method; docs/methods.md lists them. "script" takes those of
            `script_kernels.prune` too. With a query it has `floor=0.3` unless it, `mix` or `power` is given, and
            `combine="restrict", survivors=2.0` unless one of these, `gsp_drop`, `oversample` or `rounds` is; so does
            "focus", which is nothing else where no grid of the tokens is known, and for a share of up to 1/18.

    Returns:
        A `PrunedInputs`. For mRoPE models `rope_deltas` of the model is set too, as its own prefill would do.

    Raises:
        TypeError: a model that is not supported, an unknown option, an argument of a wrong type.
        ValueError: a bad value, or inputs that do not fit each other.
        RuntimeError: a model of a type that was not known, on which keeping everything changes the logits.
    """
    model = unwrap(model)
    family = family_of(model)
    device = clock_of(model)
    start = mark(device)
    if calibration is not None and (options or method is not None or reduce is not None):
        raise ValueError("calibration: expected no method, reduce or options with it, as it sets them, got both")
    chosen = settings(calibration, keep, keep_ratio, query)
    query = chosen.pop("query")
    how = {"options": options, "method": method, "reduce": reduce} | chosen
    budget = Budget(keep_ratio=keep_ratio, per=per, min_tokens=min_tokens, newlines=newlines, **how)
    renumber = _renumber(model, positions)
    if not has_pixels(model, inputs):
        return _text_only(model, inputs)
    given, host, passed = _check_inputs(model, family, inputs)
    ids, mask = host["input_ids"], host["attention_mask"]
    visuals, outputs, vision = encode(model, given, ids, mask, host)
    if not family.proven:

        def build(kept: list[Tensor], rows: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
            columns = _kept_columns(mask, visuals, kept)
            data, deltas = _assemble(model, given, host, columns, not family.has_mrope(model))
            if deltas is not None:
                model.base_model.rope_deltas = send(deltas, given["input_ids"].device)
            return data | passed | {"mm_encoder_outputs": rebuild(outputs, visuals, rows)}, columns

        check_family(model, given | passed, mask, visuals, build)

    select_start = mark(device)
    rule = methods.settled(budget.method, budget.options, budget.reduce, asked=query is not None)
    if query is not None and "grids" in methods.facts_of(rule.method):
        for visual, grids in zip(visuals, grids_of(model, visuals, host, tokenizer), strict=True):
            visual.grids = grids
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
    data, deltas = _assemble(model, given, host, columns, renumber)
    if deltas is not None:
        model.base_model.rope_deltas = send(deltas, given["input_ids"].device)
    counts = _counts(model, mask, visuals, kept, columns)
    # The one wait for a time: whatever was queued above is done then.
    total_ms = milliseconds(start, mark(device))
    vision_ms = sum(milliseconds(*run) for run in vision)
    stats = PruneStats(
        **counts, vision_ms=vision_ms, select_ms=milliseconds(select_start, select_end), prune_ms=total_ms - vision_ms
    )
    # Given twice, an argument is an error: the one way in which `generate(**pruned, prefill_chunk_size=8)` shows there.
    whole = {} if splits_chunks() else {"prefill_chunk_size": None}
    return PrunedInputs(data | passed | whole | {"mm_encoder_outputs": features}, kept, scores, stats)


def _text_only(model: PreTrainedModel, inputs: Mapping[str, Any]) -> PrunedInputs:
    """Inputs without pixels, as they are."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"inputs: expected input_ids of shape (B, S), got {getattr(ids, 'shape', None)}")
    placeholders = [i for i in (token_id(model, modality) for modality in MODALITIES) if i is not None]
    if any(bool((ids == i).any()) for i in placeholders):
        names = " or ".join(family_of(model).pixels.values())
        raise ValueError(f"inputs: expected {names} with the placeholders in input_ids, got neither")
    mask = inputs.get("attention_mask")
    lengths = (torch.ones_like(ids) if mask is None else mask).bool().sum(1).tolist()
    flops = flops_of_lengths(text_config(model), lengths)
    zeros = [0] * len(lengths)
    return PrunedInputs(dict(inputs), [], [], PruneStats(zeros, zeros, lengths, lengths, flops, flops, 0.0, 0.0, 0.0))
