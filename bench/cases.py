"""What is measured: shapes, inputs, the ops on them with the check that each must pass first, and their least work."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import script_kernels
from bench import gates
from script_kernels import reference, testing

QUERY_VECTORS = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape: `batch` images of `tokens` tokens, of which `keep` stay."""

    batch: int
    tokens: int
    keep: int

    @property
    def name(self) -> str:
        return f"{self.tokens}/{self.keep}/B{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "Row":
        tokens, keep, batch = text.split("/")
        return cls(int(batch.removeprefix("B")), int(tokens), int(keep))


ROWS = (Row(1, 576, 64), Row(8, 576, 64), Row(5, 576, 128), Row(1, 2880, 320), Row(1, 8192, 640))
QUICK_ROWS = (Row(1, 96, 12), Row(2, 49, 6))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of one shape, made when first asked for and shared by its ops."""

    row: Row
    width: int
    dtype: torch.dtype
    device: torch.device
    kind: str

    @functools.cached_property
    def tokens(self) -> Tensor:
        row = self.row
        return testing.make_tokens(self.kind, row.batch, row.tokens, self.width, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def query(self) -> Tensor:
        return testing.make_query(1, QUERY_VECTORS, self.width, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def relevance(self) -> Tensor:
        return testing.make_relevance(self.row.batch, self.row.tokens, device=self.device)

    @functools.cached_property
    def kernel(self) -> Tensor:
        return reference.kernel_matrix(self.tokens, self.relevance)

    @functools.cached_property
    def ranking(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand(self.row.batch, self.row.tokens, generator=generator)
        return noise.argsort(1)[:, : self.ranks].to(self.device)

    @functools.cached_property
    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return (torch.rand(self.row.batch, self.row.tokens, generator=generator) < 0.75).to(self.device)

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        row = self.row
        return torch.arange(0, row.batch * row.tokens + 1, row.tokens, dtype=torch.int32, device=self.device)

    @property
    def ranks(self) -> int:
        """How many tokens QCSP ranks within prune, by its defaults."""
        return min(self.row.tokens, 2 * self.row.keep)

    @property
    def survivors(self) -> int:
        """How many tokens GSP keeps within prune, by its defaults."""
        return self.row.tokens - math.floor(0.25 * self.row.tokens)


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape."""

    op: str
    arguments: tuple
    gate: Callable[[], None]  # runs the op and raises AssertionError if its result is wrong
    work: testing.Work
    inputs: Inputs

    def ours(self) -> object:
        return getattr(script_kernels, self.op)(*self.arguments)

    def oracle(self) -> object:
        return getattr(reference, self.op)(*self.arguments)


def make_case(op: str, inputs: Inputs) -> Case:
    """The op at this shape, with the default parameters."""
    x, row = inputs.tokens, inputs.row
    shape = (row.batch, row.tokens, inputs.width)
    size = x.element_size()
    k, survivors = row.keep, inputs.survivors
    if op == "query_relevance":
        arguments: tuple = (x, inputs.query)
        work = testing.query_relevance_work(*shape, QUERY_VECTORS, size)
    elif op == "bipartite_match":
        arguments = (x,)
        work = testing.bipartite_match_work(*shape, size)
    elif op == "gsp":
        arguments = (x, survivors)
        work = testing.gsp_work(*shape, survivors, 1, size)
    elif op == "dpp_map":
        arguments = (inputs.kernel, k)
        work = testing.dpp_map_work(row.batch, row.tokens, k)
    elif op == "qcsp":
        arguments = (x, inputs.relevance, k)
        work = testing.qcsp_work(*shape, k, size)
    elif op == "mask_intersect":
        arguments = (inputs.ranking, inputs.mask, k)
        work = testing.mask_intersect_work(row.batch, row.tokens, inputs.ranks, k)
    elif op == "prune":
        arguments = (x, inputs.query, k)
        work = testing.prune_work(*shape, k, size, Q=QUERY_VECTORS)
    elif op == "prune_varlen":
        arguments = (x.reshape(-1, inputs.width), inputs.cu_seqlens, inputs.query, [k] * row.batch)
        work = testing.prune_work(*shape, k, size, Q=QUERY_VECTORS)
    else:
        raise ValueError(f"op: expected one of {OPS}, got {op!r}")
    return Case(op, arguments, functools.partial(getattr(gates, op), *arguments), work, inputs)


OPS = ("query_relevance", "bipartite_match", "gsp", "dpp_map", "qcsp", "mask_intersect", "prune", "prune_varlen")
