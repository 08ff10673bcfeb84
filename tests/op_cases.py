"""One small valid call per op, in every dtype and memory layout, for the tests that treat all ops alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPS = (
    "query_relevance",
    "bipartite_match",
    "gsp",
    "dpp_map",
    "qcsp",
    "max_min",
    "mmr",
    "mask_intersect",
    "prune",
    "prune_varlen",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inside(x: Tensor, index: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
    """`x` as the view `buffer[index]` of a larger buffer; no result survives the rest of it: NaN, or a far index."""
    poison = float("nan") if x.is_floating_point() else (True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
    buffer = torch.full(shape, poison, dtype=x.dtype, device=x.device)
    view = buffer[index]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    # Columns next to each other.
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    # Rows of a wider buffer, starting at an address that is not a multiple of anything.
    "rows": lambda x: _inside(x, (slice(1, -1),) * x.ndim, tuple(n + 2 for n in x.shape)),
    # Every second element in every dimension.
    "strided": lambda x: _inside(x, (slice(None, None, 2),) * x.ndim, tuple(2 * n for n in x.shape)),
    # Every image the same memory: stride 0.
    "expanded": lambda x: x[:1].contiguous().expand_as(x) if x.ndim > 1 else x,
}


def arguments(
    name: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    B: int = 2,
    N: int = 19,
    D: int = 12,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a valid call by name, required ones first; every optional tensor is there."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens, query = randn(B, N, D), randn(B, 3, D)
    k = max(1, N // 3)
    if name == "query_relevance":
        mask = torch.tensor([[True, False, True]]).expand(B, 3)
        values = {"tokens": tokens, "query": query, "query_mask": mask}
    elif name == "bipartite_match":
        values = {"tokens": tokens}
    elif name == "gsp":
        values = {"tokens": tokens, "keep": N - N // 3}
    elif name == "dpp_map":
        factor = torch.randn(B, N, D, generator=generator)
        values = {"kernel": factor @ factor.mT, "k": k}
    elif name in ("qcsp", "max_min", "mmr"):
        values = {"tokens": tokens, "relevance": torch.rand(B, N, generator=generator), "k": k}
    elif name == "mask_intersect":
        ranking = torch.rand(B, N, generator=generator).argsort()[:, : 2 * k]
        values = {"ranking": ranking, "mask": torch.rand(B, N, generator=generator) > 0.5, "k": k}
    elif name == "prune":
        mask = torch.tensor([[True, False, True]]).expand(B, 3)
        values = {"tokens": tokens, "query": query, "keep": k, "aligned": randn(B, N, D), "query_mask": mask}
    elif name == "prune_varlen":
        lengths = [N, 0, N // 2 + 1]
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        total = sum(lengths)
        values = {
            "tokens": randn(total, D),
            "cu_seqlens": starts,
            "query": randn(3, 4, D),
            "keep": [k, 0, 1],
            "aligned": randn(total, D),
        }
    else:
        raise ValueError(f"name: expected one of {OPS}, got {name!r}")
    return {
        key: LAYOUTS[layout](value.to(device)) if isinstance(value, Tensor) else value for key, value in values.items()
    }


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments."""
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The outputs of an op as a tuple."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes that make a difference to an op."""
    return DTYPES[:1] if name in ("dpp_map", "mask_intersect") else DTYPES
