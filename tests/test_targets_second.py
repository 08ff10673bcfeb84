"""One half of the targets, the longest test of the suite: a file for each, so that two workers share it."""

import pytest
from compiled_targets import assert_all_compile

from script_kernels import targets

pytest.importorskip("triton")


def test_every_kernel_compiles_for_the_others():
    assert_all_compile(targets.TARGETS[1::2])
