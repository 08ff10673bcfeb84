"""The launch tables for Hopper, and of them what `prune` launches for Blackwell; AMD's are in test_targets_second.py.

They are the longest tests of the suite, so that is all that it compiles: `make gpu-proof` does the rest.
"""

import pytest
from compiled_targets import assert_all_compile

pytest.importorskip("triton")


def test_every_kernel_compiles_for_hopper():
    assert_all_compile("sm_90")


def test_what_prune_launches_compiles_for_blackwell():
    assert_all_compile("sm_120", "prune", "matrix")
