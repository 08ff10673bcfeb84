"""One half of the targets, the longest test of the suite: a file for each, so that two workers share it."""

import pytest
from compiled_targets import assert_all_compile

from script_kernels import targets

pytest.importorskip("triton")


def test_every_kernel_compiles_for_every_second_target():
    assert_all_compile(targets.TARGETS[::2])
