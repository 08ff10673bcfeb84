"""Exact, fast visual-token pruning for vision-language models.

`import script_kernels` registers the ops as `torch.ops.script.*` and offers them as functions: `prune`, `prune_varlen`,
their stages `query_relevance`, `bipartite_match`, `gsp`, `dpp_map`, `qcsp` and `mask_intersect`, and two rankings by
other rules, `max_min` and `mmr`. Without PyTorch only `script_kernels.numpy` works.
"""

import importlib.util
from typing import TYPE_CHECKING, NoReturn

from .version import __version__

__all__ = [
    "__version__",
    "bipartite_match",
    "dpp_map",
    "gsp",
    "mask_intersect",
    "max_min",
    "mmr",
    "prune",
    "prune_varlen",
    "qcsp",
    "query_relevance",
]

if TYPE_CHECKING or importlib.util.find_spec("torch") is not None:
    from .api import (
        bipartite_match,
        dpp_map,
        gsp,
        mask_intersect,
        max_min,
        mmr,
        prune,
        prune_varlen,
        qcsp,
        query_relevance,
    )
else:

    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            raise ImportError(
                f"script_kernels.{name} needs PyTorch, which is not installed: pip install 'torch>=2.10'. "
                "Without it, script_kernels.numpy offers the same on NumPy arrays."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
