"""Prefill cost counted from a config: no measurement, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _widths(text: Any) -> tuple[int, int]:
    """Widths of the query and of the key projection's output."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return text.num_attention_heads * head, key_heads * head


def prefill_flops(config: Any, tokens: int, *, causal: bool = True) -> int | None:
    """Floating-point operations of the language model's prefill of one prompt of `tokens` tokens.

    Two per multiply-add: the query, key, value and output projections, the two attention products (half of them with
    `causal`, since the upper triangle need not be computed), the gated MLP's three matrices, and the head on the last
    token. Norms, rotary embedding and softmax are left out. None for mixture-of-experts language models and
    for layers other than full attention.
    """
    return flops_of_lengths(config.get_text_config(), [tokens], causal=causal)[0]


def flops_of_lengths(text: Any, lengths: Sequence[int], *, causal: bool = True) -> list[int | None]:
    """`prefill_flops` of prompts of several lengths, from the text config, whose slow attributes are read once."""
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return [None] * len(lengths)
    sizes = [getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "intermediate_size")]
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}  # windows, state spaces, convolutions
    if other or not all(isinstance(size, int) for size in sizes):
        return [None] * len(lengths)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    query, key = _widths(text)
    linear = 2 * hidden * (2 * query + 2 * key + 3 * text.intermediate_size)  # per token
    attention = (2 if causal else 4) * query  # per pair of tokens
    head = 2 * hidden * text.vocab_size
    return [layers * (linear * n + attention * n * n) + head for n in lengths]


def kv_cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache that `tokens` tokens fill, all layers."""
    text = config.get_text_config()
    return 2 * text.num_hidden_layers * _widths(text)[1] * tokens * dtype.itemsize
