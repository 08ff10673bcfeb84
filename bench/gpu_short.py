"""A short run of every op on the GPU, for compute-sanitizer: python -m bench.gpu_short.

Small odd shapes, views and arguments at their limits. Every selection is certified or compared with the CPU's, every
other result held to an invariant; the first fault ends the run with status 1.
"""

import argparse
import sys

import torch
from torch import Tensor

import script_kernels
from script_kernels import testing

SHAPES = ((1, 1, 4, 1), (3, 63, 40, 9), (2, 100, 33, 100), (1, 577, 64, 64))


def require(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"gpu_short: {what}")


def distinct(indices: Tensor, limit: int) -> bool:
    ordered = indices.cpu().sort(dim=-1).values
    return bool((ordered >= 0).all() and (ordered < limit).all() and (ordered.diff(dim=-1) > 0).all())


def run_shape(batch: int, count: int, width: int, keep: int, dtype: torch.dtype, device: str) -> None:
    name = f"B{batch} N{count} D{width} k{keep} {dtype}"
    wide = testing.make_tokens("gaussian", batch, count, 2 * width, dtype=dtype, device=device)
    tokens = wide[:, :, 1 : width + 1]  # rows are not contiguous with each other
    query = testing.make_query(1, 3, width, dtype=dtype, device=device)
    relevance = script_kernels.query_relevance(tokens, query)
    require(bool(((relevance >= 0) & (relevance <= 1)).all()), f"query_relevance {name}: outside [0, 1]")

    indices, gains = script_kernels.qcsp(tokens, relevance, keep)
    require(distinct(indices, count), f"qcsp {name}: not distinct")
    testing.certify(testing.kernel64(tokens, relevance), indices)
    require(bool((gains >= 0).all()), f"qcsp {name}: a negative gain")
    kernel = testing.kernel64(tokens).float().to(device)
    testing.certify(testing.kernel64_of(kernel), script_kernels.dpp_map(kernel, keep)[0])

    best, match, degree, _, _ = script_kernels.bipartite_match(tokens)
    require(best.shape == match.shape == degree.shape, f"bipartite_match {name}: shapes")
    mask, _ = script_kernels.gsp(tokens, count - count // 4, rounds=2)
    require(bool((mask.sum(-1) == count - count // 4).all()), f"gsp {name}: the mask's size")

    ranking = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(b)) for b in range(batch)])
    found = script_kernels.mask_intersect(ranking.to(device), mask, keep).cpu()
    expected = script_kernels.mask_intersect(ranking, mask.cpu(), keep)
    require(torch.equal(found, expected), f"mask_intersect {name}: differs from the CPU")
    if device != "cpu":  # where it is an error
        broken = ranking.clone()
        broken[:, ::2] = torch.tensor([-1, 2**62, count])[torch.arange(broken[0, ::2].numel()) % 3]
        found = torch.ops.script.mask_intersect(broken.to(device), mask, keep)
        require(distinct(found, count), f"mask_intersect {name}: entries out of range")

    for combine in ("intersect", "restrict"):
        chosen = script_kernels.prune(tokens, query, keep, combine=combine)
        require(distinct(chosen, count), f"prune {name} {combine}: not distinct")
    ends = torch.arange(0, batch * count + 1, count, dtype=torch.int32, device=device)
    packed = script_kernels.prune_varlen(tokens.reshape(-1, width), ends, query, [keep] * batch)
    alone = script_kernels.prune(tokens, query, keep) + ends[:-1, None]
    require(torch.equal(packed, alone.flatten()), f"prune_varlen {name}: differs from prune")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_short", description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            run_shape(*shape, dtype, options.device)
    print(f"gpu_short: {2 * len(SHAPES)} runs of every op passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
