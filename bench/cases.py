"""What is measured: shapes, inputs, the ops on them with the check that each must pass first, and their least work."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import script_kernels
from bench import baselines, gates, least_work
from script_kernels import reference, testing

QUERY_VECTORS = 16
OPS = (
    *("prune", "dpp_map", "qcsp", "max_min", "mmr"),
    *("gsp", "query_relevance", "bipartite_match", "mask_intersect", "prune_varlen"),
)


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
GPU_ROWS = (Row(5, 576, 32), *(Row(b, n, k) for n, k in ((576, 64), (2880, 320), (8192, 640)) for b in (1, 8, 32)))
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
    asks: bool = True  # False: no query, and every relevance is 1

    @functools.cached_property
    def tokens(self) -> Tensor:
        shape = (self.row.batch, self.row.tokens, self.width)
        if self.device.type == "cuda" and self.kind == "powerlaw":
            return powerlaw_on(self.device, *shape).to(self.dtype)
        return testing.make_tokens(self.kind, *shape, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def query(self) -> Tensor:
        """What query_relevance is given; `question` is what prune is."""
        return testing.make_query(1, QUERY_VECTORS, self.width, dtype=self.dtype, device=self.device)

    @property
    def question(self) -> Tensor | None:
        return self.query if self.asks else None

    @functools.cached_property
    def relevance(self) -> Tensor:
        if not self.asks:
            return torch.ones(self.row.batch, self.row.tokens, device=self.device)
        return testing.make_relevance(self.row.batch, self.row.tokens, device=self.device)

    @functools.cached_property
    def kernel(self) -> Tensor:
        return baselines.kernel_matrix(self.tokens, self.relevance)

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

    def first(self) -> "Inputs":
        """The first image alone, of the tensors made so far."""
        alone = dataclasses.replace(self, row=dataclasses.replace(self.row, batch=1))
        made = {name: tensor[:1] for name, tensor in self.__dict__.items() if isinstance(tensor, Tensor)}
        alone.__dict__.update(made | {"query": self.query, "cu_seqlens": self.cu_seqlens[:2]})
        return alone


def powerlaw_on(device: torch.device, B: int, N: int, D: int) -> Tensor:
    """Tokens like testing's "powerlaw", drawn on the device: the CPU would take minutes over the largest.

    Image after image, so that the first is the same in every batch.
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    mixing = normal(D, D) / (D**0.5 * torch.arange(1, D + 1, device=device)[:, None])
    mean = normal(D)
    images = (normal(N, D) @ mixing for _ in range(B))
    return torch.stack([image + image.square().mean().sqrt() * mean for image in images])


CHECKED: set[tuple] = set()  # on a GPU: (op, tokens, keep, width, dtype) of the single images whose result was right


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape."""

    op: str
    arguments: tuple
    certify: Callable[[], None]  # runs the op and raises AssertionError if its result is wrong
    work: least_work.Work
    inputs: Inputs

    def ours(self) -> object:
        return getattr(script_kernels, self.op)(*self.arguments)

    def oracle(self) -> object:
        return getattr(reference, self.op)(*self.arguments)

    def eager(self, compiled: bool = False) -> Callable[[], object]:
        """What people run today on the same arguments, once more under torch.compile."""
        op, arguments = self.op, self.arguments
        if op == "prune_varlen":  # the segments are of one length here, so they are a batch
            op, arguments = "prune", (self.inputs.tokens, self.inputs.question, self.inputs.row.keep)
        if op == "prune":
            arguments = (*arguments, self.inputs.ranks, self.inputs.survivors)
        function = baselines.compiled(op) if compiled else getattr(baselines, op)
        return functools.partial(function, *arguments)

    def gate(self) -> None:
        """The check that comes before a time. A GPU's batches are too large for float64 on the CPU: there the first
        image is checked alone, and the batch must give it the same result, bit for bit."""
        inputs = self.inputs
        if inputs.device.type == "cpu":
            self.certify()
            return
        alone = make_case(self.op, inputs.first())
        key = (self.op, inputs.row.tokens, inputs.row.keep, inputs.width, inputs.dtype)
        if key not in CHECKED:
            alone.certify()
            CHECKED.add(key)
        if inputs.row.batch > 1:
            for one, other in zip(alone.first_image(), self.first_image(), strict=True):
                assert torch.equal(one, other), "the first image differs between a batch and alone"

    def first_image(self) -> tuple[Tensor, ...]:
        result = self.ours()
        if isinstance(result, tuple):
            return tuple(part[:1] for part in result)
        assert isinstance(result, Tensor)
        return (result[: self.inputs.row.keep] if self.op == "prune_varlen" else result[:1],)


def make_case(op: str, inputs: Inputs) -> Case:
    """The op at this shape, with the default parameters."""
    x, row = inputs.tokens, inputs.row
    shape = (row.batch, row.tokens, inputs.width)
    size = x.element_size()
    k, survivors = row.keep, inputs.survivors
    if op == "query_relevance":
        arguments: tuple = (x, inputs.query)
        work = least_work.query_relevance_work(*shape, QUERY_VECTORS, size)
    elif op == "bipartite_match":
        arguments = (x,)
        work = least_work.bipartite_match_work(*shape, size)
    elif op == "gsp":
        arguments = (x, survivors)
        work = least_work.gsp_work(*shape, survivors, 1, size)
    elif op == "dpp_map":
        arguments = (inputs.kernel, k)
        work = least_work.dpp_map_work(row.batch, row.tokens, k)
    elif op == "qcsp":
        arguments = (x, inputs.relevance, k)
        work = least_work.qcsp_work(*shape, k, size)
    elif op in ("max_min", "mmr"):
        arguments = (x, inputs.relevance, k)
        work = least_work.nearest_work(*shape, k, size)
    elif op == "mask_intersect":
        arguments = (inputs.ranking, inputs.mask, k)
        work = least_work.mask_intersect_work(row.batch, row.tokens, inputs.ranks, k)
    elif op in ("prune", "prune_varlen"):
        packed = (x.reshape(-1, inputs.width), inputs.cu_seqlens, inputs.question, [k] * row.batch)
        arguments = (x, inputs.question, k) if op == "prune" else packed
        work = least_work.prune_work(*shape, k, size, Q=QUERY_VECTORS if inputs.asks else 0)
    else:
        raise ValueError(f"op: expected one of {OPS}, got {op!r}")
    return Case(op, arguments, functools.partial(getattr(gates, op), *arguments), work, inputs)
