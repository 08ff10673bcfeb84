"""The text side: which of a prompt's tokens are the user's words, and their embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .device import execution_device, send
from .families import family_of, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK = "\ue000"  # a private-use character: in no template and no vocabulary


def _flat(value: Any) -> set[int]:
    if isinstance(value, int):
        return {value}
    return {i for i in value if isinstance(i, int)} if isinstance(value, (list, tuple)) else set()


def _named_ids(model: PreTrainedModel) -> tuple[set[int], set[int]]:
    """All ids that the model's configs name, such as vision_start_token_id, and of these the eos_token_id ones."""
    configs = [model.config, text_config(model), getattr(model, "generation_config", None)]
    named: set[int] = set()
    ends: set[int] = set()
    for config in configs:
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                ids = _flat(value)
                named |= ids
                if name.endswith("eos_token_id"):
                    ends |= ids
    return named, ends


def _common_suffix(ids: list[int], tail: list[int]) -> int:
    length = 0
    while length < min(len(ids), len(tail)) and ids[-1 - length] == tail[-1 - length]:
        length += 1
    return length


def _after(ids: list[int], pattern: list[int], start: int, stop: int) -> int | None:
    """Where the last occurrence of the pattern in ids[start:stop] ends, or None."""
    length = len(pattern)
    found = (i for i in range(stop - length, start - 1, -1) if ids[i : i + length] == pattern)
    return next((i + length for i in found), None) if length else None


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids around a user's message in the chat template: what comes before it and the generation prompt after it."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": MARK}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if MARK not in text:  # templates for text-only tokenizers take a plain string
        messages[0]["content"] = MARK
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text[0] if isinstance(text, list) else text
    encode = getattr(tokenizer, "tokenizer", tokenizer)
    head, tail = (encode(part, add_special_tokens=False)["input_ids"] for part in text.split(MARK))
    return head, tail


def user_columns(ids: list[int], visual: set[int], model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """Positions in `ids` (one prompt, no padding) of the words of the user's turn.

    Without a tokenizer: the text between the last visual placeholder and the end of that turn (the first end-of-text
    or end-of-turn id after it), or before the first placeholder when nothing follows. Ids that the configs name are
    left out; template words such as "ASSISTANT:" have ordinary ids and stay.

    With a tokenizer or processor: its chat template's generation prompt and role header are cut off, its special and
    added tokens and blanks are left out, and the last turn is taken wherever the image stands.
    """
    named, ends = _named_ids(model)
    special = visual | named
    if tokenizer is not None:
        words = getattr(tokenizer, "tokenizer", tokenizer)
        special |= set(words.all_special_ids) | set(words.get_added_vocab().values())
        head, tail = _template(tokenizer)
        stop = len(ids) - _common_suffix(ids, tail)
        start = max((i + 1 for i in range(stop) if ids[i] in ends), default=0)
        # The role header, with the special id that opens it where there is one: "<|im_start|>user\n", "USER: ".
        header = head[max((i for i, token in enumerate(head) if token in special), default=0) :]
        start = _after(ids, header, start, stop) or _after(ids, header[:-1], start, stop) or start
        return [i for i in range(start, stop) if ids[i] not in special and words.decode([ids[i]]).strip()]
    places = [i for i, token in enumerate(ids) if token in visual]
    first, last = places[0], places[-1]
    if family_of(model).marked:  # no config names the ids around each image, such as <img> and </img>
        special |= {ids[i] for i in (first - 1, last + 1) if 0 <= i < len(ids)}
    stop = next((i for i in range(last + 1, len(ids)) if ids[i] in ends), len(ids))
    columns = [i for i in range(last + 1, stop) if ids[i] not in special]
    if columns:
        return columns
    start = max((i + 1 for i in range(first) if ids[i] in ends), default=0)
    return [i for i in range(start, first) if ids[i] not in special]


def _collapse(ids: Tensor, visual: set[int]) -> list[int]:
    """The ids, with one placeholder for each run of the same: that it stands there matters, its length does not."""
    kept = torch.ones_like(ids, dtype=torch.bool)
    for token in visual:
        placeholder = ids == token
        kept[1:] &= ~(placeholder[1:] & placeholder[:-1])
    return ids[kept].tolist()


def text_query(model: PreTrainedModel, ids: Tensor, visual: set[int], *, mean: bool, tokenizer: Any) -> Tensor:
    """(Q, D) input embeddings of the user's words in one prompt, or their mean (1, D).

    ids: (S,) without padding, on the CPU.
    """
    short = _collapse(ids, visual)
    columns = user_columns(short, visual, model, tokenizer)
    if not columns:
        raise ValueError("query: expected text of the user in every prompt, got none; pass query=None or a tensor")
    embeddings = model.get_input_embeddings()
    words = embeddings(send(torch.tensor([short[i] for i in columns]), execution_device(embeddings)))
    return words.mean(0, keepdim=True) if mean else words
