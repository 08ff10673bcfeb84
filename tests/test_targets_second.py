"""The launch tables for AMD's GPU (see test_targets_first.py)."""

import pytest
from compiled_targets import assert_all_compile

pytest.importorskip("triton")


def test_every_kernel_compiles_for_amd():
    assert_all_compile("gfx942")
