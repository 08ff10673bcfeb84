"""Programs whose columns are two arrays, of 512 and of 128 tokens: what fits images of 576."""

import pytest
import torch
from test_triton_dpp import assert_qcsp, greedy_arguments
from triton_interpreter import DEVICE, quiet

from script_kernels import testing
from script_kernels.triton.kernels.greedy import launch_greedy
from script_kernels.triton.kernels.plan import Stage, plan_greedy

TWO_ARRAYS = {"matrix_free": False, "columns": 640}
pytestmark = quiet


def test_qcsp_of_577_tokens():
    tokens = testing.make_tokens("photo", 1, 577, 40, dtype=torch.bfloat16)
    assert_qcsp(tokens, testing.make_relevance(1, 577), 5, **TWO_ARRAYS)


@pytest.mark.parametrize(("n", "mode"), [(530, "tier"), (700, "stop")])
def test_the_same_bits_as_one_array(n, mode):
    """Alone (530) and as one of two that share an image; picks, tiers and flags on both sides of column 512."""
    tokens, relevance = testing.make_tokens("photo", 1, n, 12).to(DEVICE), testing.make_relevance(1, n).to(DEVICE)
    relevance[0, 500:530] += 1
    tokens[0, 520] = float("nan")
    flags = (torch.rand(n, generator=torch.Generator().manual_seed(5)) < 0.5).to(DEVICE)
    options = {"stop": {"stop": flags, "need": 4}, "tier": {"tier": flags}}[mode]
    (layout, order, k, _, rows), arguments = greedy_arguments(tokens, relevance, 9, matrix_free=False, columns=1024)
    found = []
    for columns in (640, 1024):
        plan = plan_greedy(tokens.device, layout, k, columns=columns)
        stage = Stage(plan, torch.zeros(plan.keys(), dtype=torch.int64, device=DEVICE), False, 0, n)
        found.append(launch_greedy(layout, order, k, stage, rows, **arguments, **options))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] >= 512).any()
    assert (found[0][0] < 512).any()


def test_all_that_there_is_is_ranked():
    """Past the rank by relevance, then by index, across both."""
    tokens = torch.zeros(1, 600, 4)
    tokens[0, [3, 511, 512, 599], range(4)] = 1
    indices, gains = assert_qcsp(tokens, torch.ones(1, 600), 8, **TWO_ARRAYS)
    assert indices.tolist() == [[3, 511, 512, 599, 0, 1, 2, 4]]
    assert gains[0].tolist() == [1] * 4 + [0] * 4
