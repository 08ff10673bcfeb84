"""Visual-token pruning for Hugging Face transformers models: one call, no fork.

`prune_inputs` turns a processor's output into the inputs of the same model with fewer visual tokens;
`script_pruning` does it inside `model.generate`. Needs transformers >= 5.18.
"""

from script_kernels.selection import Selection, plot_selection, save_html

from .calibrate import calibrate_model
from .explain import Explanation, explain
from .families import Family, register_family
from .flops import kv_cache_bytes, prefill_flops
from .layouts import Visual
from .patch import script_pruning
from .prune import PrunedInputs, PruneStats, prune_inputs

__all__ = [
    "Explanation",
    "Family",
    "PruneStats",
    "PrunedInputs",
    "Selection",
    "Visual",
    "calibrate_model",
    "explain",
    "kv_cache_bytes",
    "plot_selection",
    "prefill_flops",
    "prune_inputs",
    "register_family",
    "save_html",
    "script_pruning",
]
