"""How many tokens each stage keeps; csrc/cpu/schedule.hpp computes the same. Needs neither PyTorch nor NumPy."""

import math


def gsp_keep(n: int, gsp_drop: float) -> int:
    """Tokens that GSP keeps of `n` when it drops the share `gsp_drop` of them."""
    return n - math.floor(gsp_drop * n)


def ranking_size(n: int, keep: int, oversample: float) -> int:
    """Length of the ranking that the intersection walks, for `keep` of `n` tokens."""
    return min(n, math.ceil(oversample * keep))


def rounds_suffice(n: int, keep: int, rounds: int) -> bool:
    """Whether `rounds` rounds of GSP get from `n` tokens to `keep`: no round may drop more than its source tokens."""
    left = n - keep
    for r in range(rounds):
        if left == 0:
            break
        quota = -(-left // (rounds - r))
        if quota > (keep + left + 1) // 2:
            return False
        left -= quota
    return True


def rounds_needed(n: int, keep: int) -> int:
    """The smallest number of rounds that suffices, for 1 <= keep <= n."""
    # The last round drops about left / rounds of at most 2 keep + 1 tokens, so fewer rounds than this cannot do.
    rounds = max(1, (n - keep) // (keep + 2))
    while not rounds_suffice(n, keep, rounds):
        rounds += 1
    return rounds


def reachable(n: int, keep: int, rounds: int, asked: str) -> None:
    """Raises ValueError, naming what was `asked`, unless `rounds` rounds get from `n` tokens to `keep`."""
    if not rounds_suffice(n, keep, rounds):
        raise ValueError(
            f"{asked} of N = {n} tokens cannot be reached with rounds = {rounds} "
            f"(a round drops at most half); needs rounds >= {rounds_needed(n, keep)}"
        )
