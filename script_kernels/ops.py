"""The ops `torch.ops.script.*`: schema, fake and CUDA entry of each in one table; importing this module registers them.

CPU implementations come from the library `_C_cpu`, CUDA ones from `script_kernels.triton` (mask_intersect: the library
`_C_cuda`); both libraries use the schemas defined here. Calls on a device whose implementation is not there say what is
missing.

The ops select indices and scores and have no derivative. Their Autograd key is a fallthrough: it costs nothing per call
and leaves outputs without a gradient function, so that a backward through one fails at once. With no registration at
all, torch's fallback would mark the float outputs as requiring grad and warn in the backward only. A
torch.autograd.Function that marks them as not differentiable would do the same as the fallthrough, at the price of a
Python call. A fallthrough does not switch autograd off for what runs below it, so the CUDA entries, which are Python,
do that themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, library
from .options import GspOptions, ImageOptions, PruneOptions, QcspOptions, checker_order

# Fakes: shapes and dtypes of the outputs, after the checks. The dispatcher leaves out what has its default value.


def fake_query_relevance(tokens: Tensor, query: Tensor, query_mask: Tensor | None = None, **options: Any) -> Tensor:
    checks.query_relevance(tokens, query, query_mask, **options)
    return tokens.new_empty(tokens.shape[:2], dtype=torch.float32)


def fake_bipartite_match(tokens: Tensor, threshold: float = 0.2) -> tuple[Tensor, ...]:
    checks.bipartite_match(tokens, threshold)
    shape = (tokens.shape[0], (tokens.shape[1] + 1) // 2)
    dtypes = (torch.float32, torch.int32, torch.int32, torch.float32, torch.float32)
    return tuple(tokens.new_empty(shape, dtype=dtype) for dtype in dtypes)


def fake_gsp(tokens: Tensor, keep: int, **options: Any) -> tuple[Tensor, Tensor]:
    checks.gsp(tokens, keep, GspOptions(**options))
    shape = tokens.shape[:2]
    return tokens.new_empty(shape, dtype=torch.bool), tokens.new_empty(shape, dtype=torch.float32)


def fake_picks(like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (like.shape[0], k)
    return like.new_empty(shape, dtype=torch.int64), like.new_empty(shape, dtype=torch.float32)


def fake_dpp_map(kernel: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.dpp_map(kernel, k)
    return fake_picks(kernel, k)


def fake_qcsp(tokens: Tensor, relevance: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    checks.qcsp(tokens, relevance, k, QcspOptions(**options))
    return fake_picks(tokens, k)


def fake_max_min(tokens: Tensor, relevance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    checks.max_min(tokens, relevance, k)
    return fake_picks(tokens, k)


def fake_mmr(tokens: Tensor, relevance: Tensor, k: int, *, balance: float = 0.5) -> tuple[Tensor, Tensor]:
    checks.mmr(tokens, relevance, k, balance)
    return fake_picks(tokens, k)


def fake_mask_intersect(ranking: Tensor, mask: Tensor, k: int) -> Tensor:
    checks.mask_intersect(ranking, mask, k)
    return ranking.new_empty((ranking.shape[0], k))


def fake_prune(
    tokens: Tensor,
    query: Tensor | None,
    keep: int,
    *,
    aligned: Tensor | None = None,
    query_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    checks.prune(tokens, query, keep, aligned, query_mask, ImageOptions(**options))
    return tokens.new_empty((tokens.shape[0], keep), dtype=torch.int64)


def fake_prune_varlen(
    tokens: Tensor,
    cu_seqlens: Tensor,
    query: Tensor | None,
    keep: Sequence[int],
    *,
    aligned: Tensor | None = None,
    **options: Any,
) -> Tensor:
    checks.prune_varlen(tokens, cu_seqlens, query, keep, aligned, PruneOptions(**options))
    return tokens.new_empty((sum(keep),), dtype=torch.int64)


# CUDA entries. Triton is imported by the first call.


def cuda_query_relevance(
    tokens: Tensor, query: Tensor, query_mask: Tensor | None = None, *, negate: bool = False, reduce: str = "mean"
) -> Tensor:
    from .triton.query_relevance import launch_query_relevance

    checks.query_relevance(tokens, query, query_mask, negate, reduce)
    return launch_query_relevance(tokens, query, query_mask, negate, reduce)


def cuda_bipartite_match(tokens: Tensor, threshold: float = 0.2) -> tuple[Tensor, ...]:
    from .triton.bipartite_match import launch_bipartite_match

    checks.bipartite_match(tokens, threshold)
    return launch_bipartite_match(tokens, threshold)


def cuda_gsp(tokens: Tensor, keep: int, **given: Any) -> tuple[Tensor, Tensor]:
    from .triton.gsp import launch_gsp

    options = GspOptions(**given)
    checks.gsp(tokens, keep, options)
    return launch_gsp(tokens, keep, options)


def cuda_dpp_map(kernel: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from .triton.dpp_map import launch_dpp_map

    checks.dpp_map(kernel, k)
    return launch_dpp_map(kernel, k)


def cuda_qcsp(tokens: Tensor, relevance: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor]:
    from .triton.qcsp import launch_qcsp

    options = QcspOptions(**given)
    checks.qcsp(tokens, relevance, k, options)
    return launch_qcsp(tokens, relevance, k, options)


def cuda_max_min(tokens: Tensor, relevance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    from .triton.max_min import launch_max_min

    checks.max_min(tokens, relevance, k)
    return launch_max_min(tokens, relevance, k)


def cuda_mmr(tokens: Tensor, relevance: Tensor, k: int, *, balance: float = 0.5) -> tuple[Tensor, Tensor]:
    from .triton.mmr import launch_mmr

    checks.mmr(tokens, relevance, k, balance)
    return launch_mmr(tokens, relevance, k, balance)


def cuda_prune(
    tokens: Tensor,
    query: Tensor | None,
    keep: int,
    *,
    aligned: Tensor | None = None,
    query_mask: Tensor | None = None,
    **given: Any,
) -> Tensor:
    from .triton.prune import launch_prune

    options = ImageOptions(**given)
    checks.prune(tokens, query, keep, aligned, query_mask, options)
    if not options.checkered:
        return launch_prune(tokens, query, keep, options, aligned=aligned, query_mask=query_mask)
    order = checker_order(torch.arange(tokens.shape[1], device=tokens.device), options.checkered)
    tokens = tokens.index_select(1, order)
    if query is not None and aligned is not None:
        aligned = aligned.index_select(1, order)
    kept = launch_prune(tokens, query, keep, options, aligned=aligned, query_mask=query_mask)
    back: Tensor = checker_order(kept, options.checkered)
    return back.sort(dim=1).values


def cuda_prune_varlen(
    tokens: Tensor,
    cu_seqlens: Tensor,
    query: Tensor | None,
    keep: Sequence[int],
    *,
    aligned: Tensor | None = None,
    **given: Any,
) -> Tensor:
    from .triton.prune_varlen import launch_prune_varlen

    options = PruneOptions(**given)
    checks.prune_varlen(tokens, cu_seqlens, query, keep, aligned, options)
    return launch_prune_varlen(tokens, cu_seqlens, query, keep, options, aligned=aligned)


class Op(NamedTuple):
    """What registers one op; without a CUDA entry here, the library `_C_cuda` has it."""

    schema: str
    fake: Callable[..., Any]
    cuda: Callable[..., Any] | None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


GSP = "float threshold=0.2, float gamma=1.0, int min_degree=4, int rounds=1"
PRUNE = (
    'bool negate=False, float gsp_drop=0.25, float oversample=2.0, str combine="intersect", '  # then those of GSP
    f'{GSP}, float floor=0.0, float power=1.0, str reduce="mean"'
)

OPS = (
    Op(
        "query_relevance(Tensor tokens, Tensor query, Tensor? query_mask=None, *, bool negate=False, "
        'str reduce="mean") -> Tensor',
        fake_query_relevance,
        cuda_query_relevance,
    ),
    Op(
        "bipartite_match(Tensor tokens, float threshold=0.2) "
        "-> (Tensor best, Tensor match, Tensor degree, Tensor mean, Tensor density)",
        fake_bipartite_match,
        cuda_bipartite_match,
    ),
    Op(f"gsp(Tensor tokens, SymInt keep, *, {GSP}) -> (Tensor mask, Tensor redundancy)", fake_gsp, cuda_gsp),
    Op("dpp_map(Tensor kernel, SymInt k) -> (Tensor indices, Tensor gains)", fake_dpp_map, cuda_dpp_map),
    Op(
        "qcsp(Tensor tokens, Tensor relevance, SymInt k, *, float power=1.0, bool normalize=True, float ridge=0.0) "
        "-> (Tensor indices, Tensor gains)",
        fake_qcsp,
        cuda_qcsp,
    ),
    Op(
        "max_min(Tensor tokens, Tensor? relevance, SymInt k) -> (Tensor indices, Tensor gains)",
        fake_max_min,
        cuda_max_min,
    ),
    Op(
        "mmr(Tensor tokens, Tensor relevance, SymInt k, *, float balance=0.5) -> (Tensor indices, Tensor gains)",
        fake_mmr,
        cuda_mmr,
    ),
    Op("mask_intersect(Tensor ranking, Tensor mask, SymInt k) -> Tensor", fake_mask_intersect, None),
    Op(
        "prune(Tensor tokens, Tensor? query, SymInt keep, *, Tensor? aligned=None, Tensor? query_mask=None, "
        f'{PRUNE}, str split="raster", int? grid_width=None) -> Tensor',
        fake_prune,
        cuda_prune,
    ),
    Op(
        "prune_varlen(Tensor tokens, Tensor cu_seqlens, Tensor? query, SymInt[] keep, *, Tensor? aligned=None, "
        f"{PRUNE}) -> Tensor",
        fake_prune_varlen,
        cuda_prune_varlen,
    ),
)


def _on_cuda(op: Op) -> Callable[..., Any]:
    """The CUDA entry, without autograd below it, and with a word on what to install where Triton is missing."""

    def entry(*args: Any, **options: Any) -> Any:
        assert op.cuda is not None
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return op.cuda(*args, **options)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ImportError(
                f"script.{op.name} on CUDA needs Triton, which is not installed: pip install triton"
            ) from error

    return entry


def _missing_entry(needed: library.Library) -> Callable[..., Any]:
    """Stands where a library's implementation would be."""

    def entry(*args: Any, **options: Any) -> Any:
        raise RuntimeError(needed.missing())

    return entry


CPU_LIBRARY = library.load("_C_cpu")
CUDA_LIBRARY = library.load("_C_cuda")
# Registrations live as long as this object.
_LIBRARY = torch.library.Library("script", "FRAGMENT")

for _op in OPS:
    _LIBRARY.define(_op.schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"script::{_op.name}", _op.fake, lib=_LIBRARY)
    _LIBRARY.impl(_op.name, torch.library.fallthrough_kernel, "Autograd")
    if not CPU_LIBRARY.loaded:
        _LIBRARY.impl(_op.name, _missing_entry(CPU_LIBRARY), "CPU")
    if _op.cuda is not None:
        _LIBRARY.impl(_op.name, _on_cuda(_op), "CUDA")
    elif not CUDA_LIBRARY.loaded:
        _LIBRARY.impl(_op.name, _missing_entry(CUDA_LIBRARY), "CUDA")
