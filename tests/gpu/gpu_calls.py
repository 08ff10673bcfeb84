"""One small call of every op on CUDA tensors, for the tests that need a GPU."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import script_kernels
from script_kernels import testing

BATCH, COUNT, WIDTH, KEEP = 3, 144, 96, 20
SURVIVORS = 100


@dataclasses.dataclass(frozen=True)
class Call:
    """An op with its other arguments bound; `make(seed)` draws its tensors, in the order that `run` takes them."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[int], tuple[Tensor, ...]]

    def results(self, *tensors: Tensor) -> list[Tensor]:
        out = self.run(*tensors)
        return list(out) if isinstance(out, tuple) else [out]


def tokens(seed: int) -> Tensor:
    return testing.make_tokens("powerlaw", BATCH, COUNT, WIDTH, dtype=torch.bfloat16, seed=seed, device="cuda")


def query(seed: int) -> Tensor:
    return testing.make_query(BATCH, 5, WIDTH, dtype=torch.bfloat16, seed=seed, device="cuda")


def relevance(seed: int) -> Tensor:
    return testing.make_relevance(BATCH, COUNT, seed=seed, device="cuda")


def kernel(seed: int) -> Tensor:
    return testing.kernel64(tokens(seed), relevance(seed)).float().cuda()


def ranking(seed: int) -> Tensor:
    noise = torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, : 2 * KEEP].cuda()


def mask(seed: int) -> Tensor:
    return (torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(seed + 1)) < 0.3).cuda()


def packed(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([0, 100, 100, 301, BATCH * COUNT], dtype=torch.int32, device="cuda")
    return tokens(seed).reshape(-1, WIDTH), ends, query(seed)[:1]


CALLS = {
    "query_relevance": Call(script_kernels.query_relevance, lambda s: (tokens(s), query(s))),
    "bipartite_match": Call(script_kernels.bipartite_match, lambda s: (tokens(s),)),
    "gsp": Call(lambda x: script_kernels.gsp(x, SURVIVORS, rounds=2), lambda s: (tokens(s),)),
    "dpp_map": Call(lambda kernel: script_kernels.dpp_map(kernel, KEEP), lambda s: (kernel(s),)),
    "qcsp": Call(lambda x, r: script_kernels.qcsp(x, r, KEEP), lambda s: (tokens(s), relevance(s))),
    "mask_intersect": Call(lambda r, m: script_kernels.mask_intersect(r, m, KEEP), lambda s: (ranking(s), mask(s))),
    "prune": Call(lambda x, q: script_kernels.prune(x, q, KEEP), lambda s: (tokens(s), query(s))),
    "prune restrict": Call(
        lambda x, q: script_kernels.prune(x, q, KEEP, combine="restrict"), lambda s: (tokens(s), query(s))
    ),
    "prune_varlen": Call(lambda x, ends, q: script_kernels.prune_varlen(x, ends, q, [9, 0, 20, 11]), packed),
}
