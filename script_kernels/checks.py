"""Argument checks, one function per op: its tensors and counts in order, its options as one value.

They raise ValueError (values, shapes, devices) or TypeError (dtypes, types) with a message `argument: expected what,
got what came`; csrc/faces/torch_checks.hpp says the same to direct callers of the CPU ops. Fakes call these functions
too, with symbolic sizes under torch.compile(dynamic=True) and torch.export. A symbolic comparison is neither True nor
False until somebody asks, and asking would specialise the program on this size: a check therefore fails only where its
condition `is False`, and the compiled program is checked by the op when it runs.
"""

from collections.abc import Sequence

import torch

from .options import (
    REDUCE,
    GspOptions,
    ImageOptions,
    PruneOptions,
    QcspOptions,
    check_finite,
    check_int,
    check_keeps,
    check_name,
    check_share,
    check_sizes,
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _is_tensor(value: object, argument: str, dtype: torch.dtype | None) -> None:
    """A tensor, of this dtype; None: of a floating dtype that the ops take."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{argument}: expected a dense tensor, got {kind}")
    if dtype is None:
        if value.dtype not in FLOATING:
            raise TypeError(f"{argument}: expected float32, bfloat16 or float16, got {_dtype(value.dtype)}")
    elif value.dtype != dtype:
        raise TypeError(f"{argument}: expected {_dtype(dtype)}, got {_dtype(value.dtype)}")
    check_sizes(value.shape, argument)


def _on_device(tensor: torch.Tensor, argument: str, like: torch.Tensor, like_argument: str = "tokens") -> None:
    if tensor.device != like.device:
        raise ValueError(f"{argument}: expected the device of {like_argument}, {like.device}, got {tensor.device}")


def _in_range(count: int, argument: str, limit: int, limit_name: str) -> None:
    check_int(count, argument)
    if (count >= 1) is False or (count <= limit) is False:
        raise ValueError(f"{argument}: expected 1 <= {argument} <= {limit_name} = {limit}, got {count}")


def _tokens(tokens: torch.Tensor) -> None:
    _is_tensor(tokens, "tokens", None)
    if tokens.ndim != 3 or (tokens.shape[2] >= 1) is False:
        raise ValueError(f"tokens: expected shape (B, N, D) with D >= 1, got {_shape(tokens)}")


def _query(query: torch.Tensor, query_mask: torch.Tensor | None, batch: int, tokens: torch.Tensor, width: int) -> None:
    _is_tensor(query, "query", tokens.dtype)
    if (
        query.ndim != 3
        or ((query.shape[0] == batch) is False and (query.shape[0] == 1) is False)
        or (query.shape[1] >= 1) is False
        or (query.shape[2] == width) is False
    ):
        raise ValueError(f"query: expected shape ({batch} or 1, Q >= 1, {width}), got {_shape(query)}")
    _on_device(query, "query", tokens)
    if query_mask is None:
        return
    _is_tensor(query_mask, "query_mask", torch.bool)
    if (
        query_mask.ndim != 2
        or ((query_mask.shape[0] == batch) is False and (query_mask.shape[0] == 1) is False)
        or (query_mask.shape[1] == query.shape[1]) is False
    ):
        raise ValueError(f"query_mask: expected shape ({batch} or 1, {query.shape[1]}), got {_shape(query_mask)}")
    _on_device(query_mask, "query_mask", tokens)


def query_relevance(
    tokens: torch.Tensor,
    query: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    negate: bool = False,
    reduce: str = "mean",
) -> None:
    """Checks the arguments of `query_relevance`."""
    _tokens(tokens)
    _query(query, query_mask, tokens.shape[0], tokens, tokens.shape[2])
    check_name(reduce, "reduce", REDUCE)


def bipartite_match(tokens: torch.Tensor, threshold: float = 0.2) -> None:
    """Checks the arguments of `bipartite_match`."""
    _tokens(tokens)
    check_finite(threshold, "threshold")


def gsp(tokens: torch.Tensor, keep: int, options: GspOptions) -> None:
    """Checks the arguments of `gsp`."""
    _tokens(tokens)
    _in_range(keep, "keep", tokens.shape[1], "N")
    options.check()
    options.check_reachable(tokens.shape[1], keep)


def dpp_map(kernel: torch.Tensor, k: int) -> None:
    """Checks the arguments of `dpp_map`."""
    _is_tensor(kernel, "kernel", torch.float32)
    if kernel.ndim != 3 or (kernel.shape[1] == kernel.shape[2]) is False:
        raise ValueError(f"kernel: expected shape (B, N, N), got {_shape(kernel)}")
    _in_range(k, "k", kernel.shape[1], "N")


def max_min(tokens: torch.Tensor, relevance: torch.Tensor | None, k: int) -> None:
    """Checks the arguments of `max_min`, which are those of every ranking from tokens."""
    _tokens(tokens)
    if relevance is not None:
        by_token(relevance, "relevance", tokens)
    _in_range(k, "k", tokens.shape[1], "N")


def by_token(values: torch.Tensor, name: str, tokens: torch.Tensor) -> None:
    """Raises unless the values are a float32 number for each of the tokens, (B, N)."""
    batch, n = tokens.shape[:2]
    _is_tensor(values, name, torch.float32)
    if values.ndim != 2 or (values.shape[0] == batch) is False or (values.shape[1] == n) is False:
        raise ValueError(f"{name}: expected shape ({batch}, {n}), got {_shape(values)}")
    _on_device(values, name, tokens)


def _ranked(tokens: torch.Tensor, relevance: torch.Tensor, k: int) -> None:
    _tokens(tokens)
    _is_tensor(relevance, "relevance", torch.float32)
    max_min(tokens, relevance, k)


def qcsp(tokens: torch.Tensor, relevance: torch.Tensor, k: int, options: QcspOptions) -> None:
    """Checks the arguments of `qcsp`."""
    _ranked(tokens, relevance, k)
    options.check()


def mmr(tokens: torch.Tensor, relevance: torch.Tensor, k: int, balance: float) -> None:
    """Checks the arguments of `mmr`."""
    _ranked(tokens, relevance, k)
    check_share(balance, "balance")


def mask_intersect(ranking: torch.Tensor, mask: torch.Tensor, k: int) -> None:
    """Checks the arguments of `mask_intersect`."""
    _is_tensor(ranking, "ranking", torch.int64)
    if ranking.ndim != 2:
        raise ValueError(f"ranking: expected shape (B, P), got {_shape(ranking)}")
    batch, size = ranking.shape
    _is_tensor(mask, "mask", torch.bool)
    if mask.ndim != 2 or (mask.shape[0] == batch) is False:
        raise ValueError(f"mask: expected shape ({batch}, N), got {_shape(mask)}")
    _on_device(mask, "mask", ranking, "ranking")
    if (size <= mask.shape[1]) is False:
        raise ValueError(f"ranking: expected P <= N = {mask.shape[1]}, got P = {size}")
    _in_range(k, "k", size, "P")


def prune(
    tokens: torch.Tensor,
    query: torch.Tensor | None,
    keep: int,
    aligned: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    options: ImageOptions,
) -> None:
    """Checks the arguments of `prune`."""
    _tokens(tokens)
    batch, n, width = tokens.shape
    _in_range(keep, "keep", n, "N")
    if query is not None:
        if aligned is not None:
            _is_tensor(aligned, "aligned", tokens.dtype)
            if (
                aligned.ndim != 3
                or (aligned.shape[0] == batch) is False
                or (aligned.shape[1] == n) is False
                or (aligned.shape[2] >= 1) is False
            ):
                raise ValueError(f"aligned: expected shape ({batch}, {n}, C) with C >= 1, got {_shape(aligned)}")
            _on_device(aligned, "aligned", tokens)
            width = aligned.shape[2]
        _query(query, query_mask, batch, tokens, width)
    options.check()
    options.check_grid(n)
    options.check_drop(n, keep)


def prune_varlen(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    query: torch.Tensor | None,
    keep: Sequence[int],
    aligned: torch.Tensor | None,
    options: PruneOptions,
) -> None:
    """Checks the arguments of `prune_varlen`, all but the values of `cu_seqlens`: `segments` does those."""
    _is_tensor(tokens, "tokens", None)
    if tokens.ndim != 2 or (tokens.shape[1] >= 1) is False:
        raise ValueError(f"tokens: expected shape (T, D) with D >= 1, got {_shape(tokens)}")
    total, width = tokens.shape
    _is_tensor(cu_seqlens, "cu_seqlens", torch.int32)
    if cu_seqlens.ndim != 1 or (cu_seqlens.shape[0] >= 1) is False:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), got {_shape(cu_seqlens)}")
    _on_device(cu_seqlens, "cu_seqlens", tokens)
    count = cu_seqlens.shape[0] - 1
    check_keeps(keep)
    if (len(keep) == count) is False:
        raise ValueError(f"keep: expected one count per segment, S = {count}, got {len(keep)} counts")
    if query is not None:
        if aligned is not None:
            _is_tensor(aligned, "aligned", tokens.dtype)
            if aligned.ndim != 2 or (aligned.shape[0] == total) is False or (aligned.shape[1] >= 1) is False:
                raise ValueError(f"aligned: expected shape ({total}, C) with C >= 1, got {_shape(aligned)}")
            _on_device(aligned, "aligned", tokens)
            width = aligned.shape[1]
        _query(query, None, count, tokens, width)
    options.check()


def segments(starts: Sequence[int], total: int, keep: Sequence[int], options: PruneOptions) -> None:
    """Checks the values of `cu_seqlens` (as a list) against the tokens and `keep`; call `prune_varlen` first."""
    options.check_segments(starts, total, keep)
