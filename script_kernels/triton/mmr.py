"""TODO"""

import torch


def launch_mmr(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Not there yet."""
    raise NotImplementedError("script.mmr: expected CPU tensors, got CUDA ones")
