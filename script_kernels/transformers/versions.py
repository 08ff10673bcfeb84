"""What versions of transformers do differently with encoded features: looked for where a name tells, else by number."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def splits_chunks() -> bool:
    """Whether a chunked prefill gives each chunk its own features; before 5.23 every chunk went without them."""
    from transformers.generation import utils

    return hasattr(utils, "_slice_mm_encoder_output")


@cache
def repeats_groups() -> bool:
    """Whether beams repeat all pieces of a prompt together; 5.18 repeated each for itself and so mixed their order."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 19)


@cache
def unrepeatable(kind: Any) -> Any:
    """An encoder's output that lets nobody put other features in the place of its own."""

    class Unrepeatable(kind):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pooler_output" and getattr(self, name, None) is not None and value is not None:
                raise ValueError(
                    "num_beams, num_return_sequences: expected 1 for prompts whose numbers of visual tokens differ, as "
                    "this version of transformers repeats their features in a wrong order, got more"
                )
            super().__setattr__(name, value)

    Unrepeatable.__name__ = kind.__name__
    return Unrepeatable
