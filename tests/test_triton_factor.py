"""The order of the greedy's sums: every bit is that of one chain of fused multiply-adds over the rows of C, one by one.

How the rows lie in memory and how many are fetched at once must not show.
"""

import numpy as np
import pytest
import torch
from ptx.alu import fma
from triton_interpreter import DEVICE, quiet

from script_kernels import testing
from script_kernels.triton.dpp_map import launch_dpp_map
from script_kernels.triton.kernels import greedy

pytestmark = quiet


def chain(kernel, k):
    """Picks and gains of one image, an addition at a time."""
    residual = kernel.diagonal().copy()
    rows, picks, gains = [], [], []
    for _ in range(k):
        j = int(residual.argmax())
        gain = residual[j]
        total = np.zeros_like(residual)
        for row in rows:
            total = fma(row, np.full_like(row, row[j]), total)
        row = (kernel[j] - total) * (np.float32(1) / np.sqrt(gain))
        less = fma(-row, row, residual)
        residual = np.where(residual >= 0, np.where(less > 0, less, np.float32(0)), residual)
        residual[j] = -2
        rows.append(row)
        picks.append(j)
        gains.append(gain)
    return picks, np.array(gains)


@pytest.mark.parametrize(
    ("columns", "n", "k", "at_once"), [(64, 100, 23, 4), (256, 70, 39, 4), (1024, 70, 22, 16), (2048, 33, 11, 8)]
)
def test_bits_of_the_chain(columns, n, k, at_once, monkeypatch):
    """Whole chunks, whole groups of four behind them, and one to three rows more."""
    monkeypatch.setattr(greedy, "INTERPRETER_UNROLL", at_once)
    kernel = testing.kernel64(testing.make_tokens("photo", 1, n, 48), testing.make_relevance(1, n)).float()
    indices, gains = launch_dpp_map(kernel.to(DEVICE), k, columns=columns)
    expected, expected_gains = chain(kernel[0].numpy(), k)
    assert indices[0].tolist() == expected
    assert torch.equal(gains[0].cpu(), torch.from_numpy(expected_gains))
