"""Every launch that is compiled ahead: (group, variant, call), each call on tensors without storage (device "meta").

`python -m script_kernels.targets` records what the calls launch and compiles it for every GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from script_kernels.options import GspOptions, PruneOptions, QcspOptions

from .bipartite_match import launch_bipartite_match
from .gsp import launch_gsp
from .kernels.greedy import SHARERS, launch_greedy
from .kernels.layout import Layout
from .kernels.pairs import PAIR_TILES, launch_pairs
from .kernels.plan import EXTRA_ROUNDS, FEATURE_BLOCKS, Plan, Stage
from .kernels.rows import Rows
from .max_min import launch_max_min
from .mmr import launch_mmr
from .prune import launch_prune
from .prune_varlen import launch_prune_varlen
from .qcsp import launch_qcsp
from .query_relevance import launch_query_relevance

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def relevance(dtype: torch.dtype, masked: bool = False, vectors: int = 20) -> None:
    mask = empty(8, vectors, dtype=torch.bool) if masked else None
    launch_query_relevance(empty(8, 576, 1024, dtype=dtype), empty(8, vectors, 1024, dtype=dtype), mask)


def match(dtype: torch.dtype, n: int = 576) -> None:
    launch_bipartite_match(empty(8, n, 1024, dtype=dtype))


def gsp(dtype: torch.dtype, rounds: int = 1) -> None:
    launch_gsp(empty(8, 576, 1024, dtype=dtype), 432, GspOptions(rounds=rounds))


def matrix(dtype: torch.dtype, packed: bool) -> None:
    """L alone, as qcsp wants it."""
    shape = (2048,) if packed else (2, 1024)
    tokens, row = empty(*shape, 4096, dtype=dtype), empty(*shape)
    layout = Layout.of(tokens, empty(3, dtype=torch.int32) if packed else None)
    launch_pairs(tokens, layout, Rows(row, row), row, width=1024, clear=empty(4096, dtype=torch.int64))


def qcsp(dtype: torch.dtype, n: int, **options: Any) -> None:
    launch_qcsp(empty(1, n, 1024, dtype=dtype), empty(1, n), 64, QcspOptions(**options))


def nearest(op: Callable[..., object], dtype: torch.dtype, n: int) -> None:
    op(empty(1, n, 1024, dtype=dtype), empty(1, n), 64)


def largest(dtype: torch.dtype, masked: bool = False) -> None:
    mask = empty(8, 20, dtype=torch.bool) if masked else None
    launch_query_relevance(empty(8, 576, 1024, dtype=dtype), empty(1, 20, 1024, dtype=dtype), mask, reduce="max")


def greedy(columns: int, mode: str, *, sharers: int = 1, features: torch.dtype | None = None) -> None:
    """Images of as many blocks as an exchange of so many sharers serves, or of one."""
    packed = mode in ("packed", "packed tiers")
    grid = sharers > 1
    n, k = sharers * columns, 64
    shape = (2 * n,) if packed else (2, n)
    row, flags = empty(*shape), empty(*shape, dtype=torch.bool)
    counts = empty(2, dtype=torch.int32) if packed else None
    layout = Layout.of(row, empty(3, dtype=torch.int32) if packed else None)
    slots, total = layout.slots(columns)
    plan = Plan(columns, slots, total, grid, True, 2, k + EXTRA_ROUNDS)
    stage = Stage(plan, empty(*plan.keys(), dtype=torch.int64), features is not None, 0, layout.n)
    tokens = None if features is None else empty(*shape, 1024, dtype=features)
    kernel = empty(*shape, n)
    if mode == "diagonal":
        launch_greedy(layout, kernel, k, stage, kernel=kernel)
        return
    tier = flags if mode.endswith("tiers") else None
    stop = flags if tier is None else None
    need = 48 if counts is None else counts
    launch_greedy(
        *(layout, row, k, stage, Rows(row, row)),
        kernel=kernel,
        tokens=tokens,
        own=row,
        tier=tier,
        stop=stop,
        need=0 if stop is None else need,
        limits=counts,
    )


def prune(dtype: torch.dtype, *, query: bool = True, aligned: bool = False, **options: Any) -> None:
    launch_prune(
        empty(8, 576, 4096, dtype=dtype),
        empty(8, 20, 1024 if aligned else 4096, dtype=dtype) if query else None,
        64,
        PruneOptions(**options),
        aligned=empty(8, 576, 1024, dtype=dtype) if aligned else None,
    )


def prune_varlen(dtype: torch.dtype, rounds: int = 1) -> None:
    tokens, query = empty(2880, 4096, dtype=dtype), empty(1, 20, 4096, dtype=dtype)
    launch_prune_varlen(tokens, empty(6, dtype=torch.int32), query, [32] * 5, PruneOptions(rounds=rounds))


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LAUNCHES: tuple[tuple[str, str, Callable[[], None]], ...] = (
    ("query_relevance", "bf16", partial(relevance, BF16)),
    ("query_relevance", "fp16 masked", partial(relevance, FP16, True)),
    ("query_relevance", "fp32", partial(relevance, FP32)),
    ("query_relevance", "bf16 Q=512", partial(relevance, BF16, vectors=512)),
    ("bipartite_match", "bf16", partial(match, BF16)),
    ("bipartite_match", "fp16", partial(match, FP16)),
    ("bipartite_match", "fp32", partial(match, FP32)),
    ("bipartite_match", "bf16 N=1", partial(match, BF16, 1)),
    ("gsp", "bf16", partial(gsp, BF16)),
    ("gsp", "bf16 2 rounds", partial(gsp, BF16, 2)),
    ("gsp", "fp32 2 rounds", partial(gsp, FP32, 2)),
    *(
        ("matrix", f"{named(dtype)}{' packed' if packed else ''}", partial(matrix, dtype, packed))
        for dtype in PAIR_TILES
        for packed in (False, True)
    ),
    *(
        ("greedy", f"{columns} {mode} of {sharers}", partial(greedy, columns, mode, sharers=sharers))
        for columns, *widths in ((64, SHARERS[1]), (256, 1, *SHARERS), (640, 1), (1024, 1), (2048, 1, SHARERS[0]))
        for sharers in widths
        for mode in ("diagonal", "stop", "tiers")
    ),
    *(
        ("greedy", f"{columns} {mode} of {sharers}", partial(greedy, columns, mode, sharers=sharers))
        for columns, *widths in ((64, SHARERS[1]), (256, 1, SHARERS[1]), (1024, 1, SHARERS[1]))
        for sharers in widths
        for mode in ("packed", "packed tiers")
    ),
    *(
        (
            "greedy",
            f"{columns} {mode} of {sharers} {named(dtype)}",
            partial(greedy, columns, mode, sharers=sharers, features=dtype),
        )
        for columns in FEATURE_BLOCKS
        for sharers in (SHARERS[1:] if columns < 512 else SHARERS[:1])
        for dtype in (FP32, BF16, FP16)
        for mode in ("stop", "packed tiers")
    ),
    ("qcsp", "bf16", partial(qcsp, BF16, 576)),
    ("qcsp", "fp32 2880", partial(qcsp, FP32, 2880)),
    ("qcsp", "bf16 8192", partial(qcsp, BF16, 8192)),
    ("qcsp", "bf16 20000", partial(qcsp, BF16, 20000)),
    ("qcsp", "bf16 power", partial(qcsp, BF16, 576, power=2.0)),
    ("qcsp", "fp32 20000 raw rows, ridge", partial(qcsp, FP32, 20000, normalize=False, ridge=0.1)),
    *(
        (name, f"{named(dtype)} {n}", partial(nearest, op, dtype, n))
        for name, op in (("max_min", launch_max_min), ("mmr", launch_mmr))
        for dtype, n in ((BF16, 576), (FP32, 2880), (FP16, 20000))
    ),
    *(
        ("query_relevance", f"{named(dtype)} largest", partial(largest, dtype, dtype == FP32))
        for dtype in (BF16, FP16, FP32)
    ),
    ("prune", "bf16", partial(prune, BF16)),
    ("prune", "bf16 by the largest cosine, power", partial(prune, BF16, reduce="max", power=2.0)),
    ("prune", "fp16 no query", partial(prune, FP16, query=False)),
    ("prune", "bf16 union", partial(prune, BF16, combine="union")),
    ("prune", "fp32 aligned, restrict", partial(prune, FP32, aligned=True, combine="restrict")),
    ("prune_varlen", "bf16", partial(prune_varlen, BF16)),
    ("prune_varlen", "fp32 2 rounds", partial(prune_varlen, FP32, 2)),
)
