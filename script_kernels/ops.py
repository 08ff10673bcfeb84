"""The ops `torch.ops.script.*`: every schema, fake and CUDA registration. Importing this module registers them all.

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

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import checks, library

SCHEMAS = (
    "query_relevance(Tensor tokens, Tensor query, Tensor? query_mask=None, *, bool negate=False) -> Tensor",
    "bipartite_match(Tensor tokens, float threshold=0.2) "
    "-> (Tensor best, Tensor match, Tensor degree, Tensor mean, Tensor density)",
    "gsp(Tensor tokens, int keep, *, float threshold=0.2, float gamma=1.0, int min_degree=4, int rounds=1) "
    "-> (Tensor mask, Tensor redundancy)",
    "dpp_map(Tensor kernel, int k) -> (Tensor indices, Tensor gains)",
    "qcsp(Tensor tokens, Tensor relevance, int k) -> (Tensor indices, Tensor gains)",
    "mask_intersect(Tensor ranking, Tensor mask, int k) -> Tensor",
    "prune(Tensor tokens, Tensor? query, int keep, *, Tensor? aligned=None, Tensor? query_mask=None, "
    'bool negate=False, float gsp_drop=0.25, float oversample=2.0, str combine="intersect", float threshold=0.2, '
    "float gamma=1.0, int min_degree=4, int rounds=1) -> Tensor",
    "prune_varlen(Tensor tokens, Tensor cu_seqlens, Tensor? query, int[] keep, *, Tensor? aligned=None, "
    'bool negate=False, float gsp_drop=0.25, float oversample=2.0, str combine="intersect", float threshold=0.2, '
    "float gamma=1.0, int min_degree=4, int rounds=1) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)

# Registrations live as long as this object.
_LIBRARY = torch.library.Library("script", "FRAGMENT")


# Fakes: shapes and dtypes of the outputs.


def _fake_query_relevance(tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    checks.query_relevance(tokens, *args, **options)
    return tokens.new_empty(tokens.shape[:2], dtype=torch.float32)


def _fake_bipartite_match(tokens: torch.Tensor, threshold: float = 0.2) -> tuple[torch.Tensor, ...]:
    checks.bipartite_match(tokens, threshold)
    shape = (tokens.shape[0], (tokens.shape[1] + 1) // 2)
    dtypes = (torch.float32, torch.int32, torch.int32, torch.float32, torch.float32)
    return tuple(tokens.new_empty(shape, dtype=dtype) for dtype in dtypes)


def _fake_gsp(tokens: torch.Tensor, keep: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    checks.gsp(tokens, keep, **options)
    shape = tokens.shape[:2]
    return tokens.new_empty(shape, dtype=torch.bool), tokens.new_empty(shape, dtype=torch.float32)


def _fake_picks(like: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (like.shape[0], k)
    return like.new_empty(shape, dtype=torch.int64), like.new_empty(shape, dtype=torch.float32)


def _fake_dpp_map(kernel: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    checks.dpp_map(kernel, k)
    return _fake_picks(kernel, k)


def _fake_qcsp(tokens: torch.Tensor, relevance: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    checks.qcsp(tokens, relevance, k)
    return _fake_picks(tokens, k)


def _fake_mask_intersect(ranking: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    checks.mask_intersect(ranking, mask, k)
    return ranking.new_empty((ranking.shape[0], k))


def _fake_prune(tokens: torch.Tensor, query: torch.Tensor | None, keep: int, **options: Any) -> torch.Tensor:
    checks.prune(tokens, query, keep, **options)
    return tokens.new_empty((tokens.shape[0], keep), dtype=torch.int64)


def _fake_prune_varlen(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, query: torch.Tensor | None, keep: Sequence[int], **options: Any
) -> torch.Tensor:
    checks.prune_varlen(tokens, cu_seqlens, query, keep, **options)
    return tokens.new_empty((sum(keep),), dtype=torch.int64)


# Entries.


def _triton_entry(name: str, schema: torch.FunctionSchema) -> Callable[..., Any]:
    """The CUDA implementation of an op: `script_kernels.triton.<name>.launch_<name>`, imported when first called.

    The dispatcher leaves out arguments that have their default value; the launcher gets all of them, in order.
    """
    arguments = [(argument.name, argument.default_value) for argument in schema.arguments]
    check = getattr(checks, name)
    launch: Callable[..., Any] | None = None

    def entry(*args: Any, **options: Any) -> Any:
        nonlocal launch
        if launch is None:
            try:
                module = importlib.import_module(f"{__package__}.triton.{name}")
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise ImportError(
                    f"script.{name} on CUDA needs Triton, which is not installed: pip install triton"
                ) from error
            launch = getattr(module, f"launch_{name}")
        values = (*args, *(options.get(key, default) for key, default in arguments[len(args) :]))
        check(*values)
        with torch._C._AutoDispatchBelowAutograd():
            return launch(*values)

    return entry


def _missing_entry(needed: library.Library) -> Callable[..., Any]:
    """Stands where a library's implementation would be."""

    def entry(*args: Any, **options: Any) -> Any:
        raise RuntimeError(needed.missing())

    return entry


CPU_LIBRARY = library.load("_C_cpu")
CUDA_LIBRARY = library.load("_C_cuda")

for _name, _schema in zip(NAMES, SCHEMAS, strict=True):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"script::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    if not CPU_LIBRARY.loaded:
        _LIBRARY.impl(_name, _missing_entry(CPU_LIBRARY), "CPU")
    if _name != "mask_intersect":
        _LIBRARY.impl(_name, _triton_entry(_name, getattr(torch.ops.script, _name).default._schema), "CUDA")
    elif not CUDA_LIBRARY.loaded:
        _LIBRARY.impl(_name, _missing_entry(CUDA_LIBRARY), "CUDA")
