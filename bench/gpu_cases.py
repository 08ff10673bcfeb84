"""What the GPU report measures: shapes in order of importance, inputs made on the device, captured graphs."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench import baselines
from bench.cases import Case, Inputs, Row
from bench.timing import Variant

BATCHES = (1, 8, 32)
SIZES = ((576, 64), (2880, 320), (8192, 640))
WIDTHS = (1024, 4096)
# The shapes that the targets speak of, then every size at every batch, then the one left of the design's table.
TARGET_SHAPES = ((Row(1, 576, 64), 4096), (Row(5, 576, 32), 4096))
MAIN_OPS = ("dpp_map", "prune", "qcsp", "gsp", "query_relevance", "bipartite_match", "mask_intersect", "prune_varlen")
# Beyond this many entries of L, three copies of it and a captured graph's private ones do not fit beside each other.
MOST_ENTRIES_CAPTURED = 1 << 30


@dataclasses.dataclass(frozen=True)
class DeviceInputs(Inputs):
    """Tokens with a power-law spectrum and a common mean, drawn on the device: the CPU would take minutes."""

    @functools.cached_property
    def tokens(self) -> Tensor:
        row, width = self.row, self.width
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        mixing = normal(width, width) / width**0.5 / torch.arange(1, width + 1, device=self.device)[:, None]
        mean = normal(width)
        # Image after image: a batch's image is the same for every batch size.
        images = []
        for _ in range(row.batch):
            image = normal(row.tokens, width) @ mixing
            images.append((image + image.std() * mean).to(self.dtype))
        return torch.stack(images)

    @functools.cached_property
    def kernel(self) -> Tensor:
        return baselines.kernel_matrix(self.tokens, self.relevance)


def shapes() -> list[tuple[Row, int]]:
    """(row, width), the most important first."""
    wanted = list(TARGET_SHAPES)
    wanted += [(Row(b, n, k), 1024) for n, k in SIZES for b in BATCHES]
    wanted.append((Row(5, 576, 128), 1024))
    wanted += [(Row(b, n, k), 4096) for n, k in SIZES for b in BATCHES]
    wanted.append((Row(5, 576, 128), 4096))
    return list(dict.fromkeys(wanted))


def batch_of_one(inputs: DeviceInputs) -> DeviceInputs:
    """The same case with its first image alone."""
    alone = dataclasses.replace(inputs, row=dataclasses.replace(inputs.row, batch=1))
    for name in ("tokens", "relevance", "kernel", "ranking", "mask"):
        if name in inputs.__dict__:
            alone.__dict__[name] = inputs.__dict__[name][:1]
    return alone


def first_image(case: Case) -> tuple[Tensor, ...]:
    """What the op gives for the first image of the batch."""
    result = case.ours()
    parts = result if isinstance(result, tuple) else (result,)
    if case.op == "prune_varlen":
        return (parts[0][: case.inputs.row.keep],)
    return tuple(part[:1] for part in parts)


def bipartite_match(tokens: Tensor, threshold: float = 0.2) -> tuple[Tensor, ...]:
    """The matching written as its form allows; like the baselines, it knows nothing of zero rows, NaN or ties."""
    unit = baselines.normalise(tokens)
    similarity = torch.bmm(unit[:, 0::2], unit[:, 1::2].mT)
    near = similarity >= threshold
    degree = near.sum(-1)
    best, match = similarity.max(-1)
    return best, 2 * match + 1, degree, (similarity * near).sum(-1) / degree.clamp(min=1), similarity.mean(-1)


def mask_intersect(ranking: Tensor, mask: Tensor, k: int) -> Tensor:
    """Members first by a stable sort, then the first k in ascending order."""
    order = mask.gather(1, ranking).logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices[:, :k]
    return ranking.gather(1, order).sort(dim=-1).values


REFERENCES: dict[str, Callable[..., object]] = {
    "query_relevance": baselines.query_relevance,
    "bipartite_match": bipartite_match,
    "gsp": baselines.gsp,
    "dpp_map": baselines.dpp_map,
    "qcsp": baselines.qcsp,
    "mask_intersect": mask_intersect,
    "prune": baselines.prune,
    "prune_varlen": baselines.prune,
}


def reference_call(case: Case, compiled: baselines.Compiled | None = None) -> Callable[[], object]:
    """What PyTorch users run for this op, on the same arguments; `compiled`: under torch.compile."""
    inputs, arguments = case.inputs, case.arguments
    if case.op == "prune_varlen":  # the segments are of one length here, so they are a batch
        arguments = (inputs.tokens, inputs.query, inputs.row.keep)
    if REFERENCES[case.op] is baselines.prune:
        arguments = (*arguments, inputs.ranks, inputs.survivors)
    function = REFERENCES[case.op]
    if compiled is not None:
        looped = getattr(compiled, function.__name__, None)  # their loops are compiled step by step
        function = looped if looped is not None else torch.compile(function, dynamic=False)
    return functools.partial(function, *arguments)


def captured(call: Callable[[], object]) -> Variant:
    """The call as a CUDA graph; replaying it runs the same kernels on the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay
