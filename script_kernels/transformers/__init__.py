"""Visual-token pruning for Hugging Face transformers models: one call, no fork.

`prune_inputs` turns a processor's output into the inputs of the same model with fewer visual tokens;
`script_pruning` does it inside `model.generate`. Needs transformers >= 5.18.
"""

from .calibrate import calibrate_model
from .families import Family, register_family
from .flops import kv_cache_bytes, prefill_flops
from .layouts import Visual
from .patch import script_pruning
from .prune import PrunedInputs, PruneStats, prune_inputs

__all__ = [
    "Family",
    "PruneStats",
    "PrunedInputs",
    "Visual",
    "calibrate_model",
    "kv_cache_bytes",
    "prefill_flops",
    "prune_inputs",
    "register_family",
    "script_pruning",
]
