"""torch.compile and torch.export: one graph, no size specialised, same results, errors still raised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import OPS, arguments, outputs, tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import script_kernels


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Pruner(nn.Module):
    """What a model does: prune, then gather."""

    def __init__(self, keep: int, **options: Any) -> None:
        super().__init__()
        self.keep = keep
        self.options = options

    def forward(self, tokens: Tensor, query: Tensor) -> Tensor:
        kept = script_kernels.prune(tokens, query, self.keep, **self.options)
        return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[2])) * 2


SIZES = [(2, 40, 3), (3, 41, 5), (1, 577, 2), (5, 16, 4)]  # B, N, Q


def inputs(B: int, N: int, Q: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    tokens, query = torch.randn(B, N, 24, generator=generator), torch.randn(1, Q, 24, generator=generator)
    return tokens.to(device), query.to(device)


def check_all_sizes(function: Callable[[Tensor, Tensor], Tensor], model: Pruner, device: str) -> None:
    for B, N, Q in SIZES:
        tokens, query = inputs(B, N, Q, device)
        assert torch.equal(function(tokens, query), model(tokens, query)), (B, N, Q)


@pytest.mark.parametrize(
    "options", [{}, {"combine": "restrict", "rounds": 2, "gsp_drop": 0.5}], ids=["default", "restrict"]
)
def test_one_dynamic_graph_serves_every_size(options: dict[str, Any], device: str) -> None:
    model = Pruner(16, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(*inputs(2, 40, 3, device))
    first = counter.frame_count
    for B, N, Q in ((3, 41, 5), (5, 16, 4), (2, 2880, 2)):
        tokens, query = inputs(B, N, Q, device)
        assert torch.equal(compiled(tokens, query), model(tokens, query)), (B, N, Q)
    assert counter.frame_count == first
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes].count(torch.ops.script.prune.default) == 1


def test_inductor(device: str) -> None:
    model = Pruner(16)
    check_all_sizes(torch.compile(model, fullgraph=True, dynamic=True), model, device)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_sizes(strict: bool, device: str) -> None:
    model = Pruner(16)
    shapes = ({0: Dim("B"), 1: Dim("N")}, {1: Dim("Q")})
    program = torch.export.export(model, inputs(2, 40, 3, device), dynamic_shapes=shapes, strict=strict)
    assert [n.target for n in program.graph.nodes if "script" in str(n.target)] == [torch.ops.script.prune.default]
    check_all_sizes(program.module(), model, device)


class Share(nn.Module):
    """Keeps a quarter of the tokens, however many there are: `keep` is a size of the graph."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        quarter = tokens.shape[1] // 4
        starts = torch.zeros(2, dtype=torch.int32)
        starts[1] = tokens.shape[1]
        mask, _ = script_kernels.gsp(tokens, 3 * quarter)
        ranking, _ = script_kernels.qcsp(tokens, torch.ones(tokens.shape[:2]), quarter)
        picks, _ = script_kernels.dpp_map(tokens @ tokens.mT, quarter)
        packed = script_kernels.prune_varlen(tokens[0], starts, None, [quarter])
        kept = script_kernels.prune(tokens, None, quarter)
        return mask, ranking, picks, script_kernels.mask_intersect(ranking, mask, quarter), packed, kept


def test_a_keep_that_follows_the_size_compiles_once() -> None:
    model = Share()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(2, 40, 24))
    first = counter.frame_count
    for N in (40, 44, 128, 80):
        tokens = torch.randn(2, N, 24)
        for got, want in zip(compiled(tokens), model(tokens), strict=True):
            assert torch.equal(got, want), N
    assert counter.frame_count == first


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_keep_that_follows_the_size_exports(strict: bool) -> None:
    model = Share()
    quarter = Dim("quarter", min=8, max=4096)
    program = torch.export.export(model, (torch.randn(2, 40, 24),), dynamic_shapes=({1: 4 * quarter},), strict=strict)
    for n in (40, 44, 128):
        tokens = torch.randn(2, n, 24)
        for got, want in zip(program.module()(tokens), model(tokens), strict=True):
            assert torch.equal(got, want), n


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_program_still_refuses_what_does_not_fit(strict: bool) -> None:
    shapes = ({0: Dim("B"), 1: Dim("N")}, {1: Dim("Q")})
    program = torch.export.export(Pruner(16), inputs(2, 40, 3, "cpu"), dynamic_shapes=shapes, strict=strict)
    tokens, query = inputs(2, 12, 3, "cpu")
    with pytest.raises(RuntimeError, match=r"keep: expected 1 <= keep <= N = 12, got 16"):
        program.module()(tokens, query)


def test_compiled_call_still_refuses_what_does_not_fit() -> None:
    compiled = torch.compile(Pruner(16), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*inputs(2, 40, 3, "cpu"))
    with pytest.raises(RuntimeError, match=r"keep: expected 1 <= keep <= N = 12, got 16"):
        compiled(*inputs(2, 12, 3, "cpu"))


def test_tracing_refuses_what_is_static() -> None:
    with pytest.raises(Exception, match=r"keep: expected 1 <= keep <= N = 40, got 41"):
        torch.export.export(Pruner(41), inputs(2, 40, 3, "cpu"))


@pytest.mark.parametrize("name", OPS)
def test_each_op_compiles_with_symbolic_sizes(name: str, device: str) -> None:
    """Through the public function; other sizes do not compile again."""
    function = getattr(script_kernels, name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for B, N, D in ((2, 19, 12), (3, 20, 17), (4, 19, 5)):
        # Numbers are constants of the graph, as in a model.
        values = {**arguments(name, B=B, N=N, D=D, device=device), **numbers_of(name)}
        for got, want in zip(outputs(compiled(**values)), outputs(function(**values)), strict=True):
            assert torch.equal(got, want), (B, N, D)
        first = first or counter.frame_count
    assert counter.frame_count == first


def numbers_of(name: str) -> dict[str, Any]:
    """The arguments of the valid call that are no tensors."""
    return {key: value for key, value in arguments(name).items() if not isinstance(value, Tensor)}


class Call(nn.Module):
    """One op with fixed numbers."""

    def __init__(self, name: str, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.function = getattr(script_kernels, name)
        self.numbers = numbers

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return self.function(**tensors, **self.numbers)


# Which symbol each dimension is; D and Q stay symbolic too.
DIMENSIONS = {
    "query_relevance": {"tokens": "BND", "query": "BQD", "query_mask": "BQ"},
    "bipartite_match": {"tokens": "BND"},
    "gsp": {"tokens": "BND"},
    "dpp_map": {"kernel": "BNN"},
    **{name: {"tokens": "BND", "relevance": "BN"} for name in ("qcsp", "max_min", "mmr")},
    "mask_intersect": {"ranking": "BP", "mask": "BN"},
    "prune": {"tokens": "BND", "query": "BQC", "aligned": "BNC", "query_mask": "BQ"},
    "prune_varlen": {"tokens": "TD", "cu_seqlens": "-", "query": "-QC", "aligned": "TC"},
}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", OPS)
def test_each_op_exports_with_every_size_dynamic(name: str, strict: bool, device: str) -> None:
    values = arguments(name, device=device)
    numbers = numbers_of(name)
    # With N = 2 bipartite_match returns one entry, and torch keeps sizes of 1 apart.
    symbols = {letter: Dim(letter, min=3) if letter == "N" else Dim(letter) for letter in "BNDQPCT"}
    shapes = {
        key: {d: symbols[letter] for d, letter in enumerate(text) if letter != "-"}
        for key, text in DIMENSIONS[name].items()
    }
    call = Call(name, numbers)
    program = torch.export.export(call, (tensors(values),), dynamic_shapes=(shapes,), strict=strict)
    # prune_varlen's segments are fixed by cu_seqlens and keep.
    other = arguments(name, B=5, N=20, D=7, seed=1, device=device) if name != "prune_varlen" else values
    other = {**other, **numbers}
    for got, want in zip(
        outputs(program.module()(tensors(other))), outputs(getattr(script_kernels, name)(**other)), strict=True
    ):
        assert torch.equal(got, want)
