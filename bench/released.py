"""python -m bench released: what the released selection rule costs against the exact greedy, as log-determinants.

For each kind of tokens: 576 tokens of width 256, relevance in [0.1, 1] from four query vectors, 64 picks. The log-det
of the block of the float64 kernel that the picks choose is what greedy MAP tries to make large.
"""

import argparse

import torch

import script_kernels
from script_kernels import reference, testing

TOKENS, WIDTH, PICKS = 576, 256, 64


def log_det(kernel: torch.Tensor, picks: torch.Tensor) -> float:
    """The log-determinant of the block of `kernel` (N, N) that `picks` (k,) choose."""
    return float(torch.linalg.slogdet(kernel[picks][:, picks]).logabsdet)


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench released", description=__doc__).parse_args(arguments)
    print(f"N {TOKENS}, D {WIDTH}, k {PICKS}, float32, torch {torch.__version__}")
    print(f"{'tokens':10} {'exact greedy':>13} {'released rule':>14} {'relevance top-k':>16} {'picks in common':>16}")
    for kind in testing.KINDS:
        tokens = testing.make_tokens(kind, 1, TOKENS, WIDTH, seed=0)
        query = testing.make_tokens(kind, 1, 4, WIDTH, seed=1)
        relevance = 0.1 + 0.9 * script_kernels.query_relevance(tokens, query)
        kernel = testing.kernel64(tokens, relevance)
        exact, _ = script_kernels.qcsp(tokens, relevance, PICKS)
        released = reference.released_map(kernel, PICKS)
        top = relevance.topk(PICKS).indices
        common = len(set(exact[0].tolist()) & set(released[0].tolist()))
        scores = [log_det(kernel[0], picks[0]) for picks in (exact, released, top)]
        print(f"{kind:10} {scores[0]:13.1f} {scores[1]:14.1f} {scores[2]:16.1f} {common:16d}")
    return 0
