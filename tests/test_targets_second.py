"""The launch tables for two more targets: the newest of NVIDIA's, and AMD's (see test_targets_first.py)."""

import pytest
from compiled_targets import assert_all_compile

pytest.importorskip("triton")


def test_every_kernel_compiles_for_blackwell_and_for_amd():
    assert_all_compile(("sm_120", "gfx942"))
