"""The launch tables for two targets, one of them with the least shared memory. Four targets of seven, in two files that
two workers share, are the longest test of the suite; `make gpu-proof` compiles for all."""

import pytest
from compiled_targets import assert_all_compile

pytest.importorskip("triton")


def test_every_kernel_compiles_for_ampere_and_hopper():
    assert_all_compile(("sm_86", "sm_90"))
