"""The soak's measure sees what a call leaves behind."""

from bench import soak


def test_a_leak_is_seen() -> None:
    assert soak.slope(soak.soak(2000, leak=4000, windows=10), "heap") > 3000


def test_the_slope_is_that_of_a_line() -> None:
    rows = [{"calls": float(i * 10), "heap": 7.0 + 5.0 * i} for i in range(100)]
    assert abs(soak.slope(rows, "heap") - 0.5) < 1e-9
