"""Interleaved timing, captured graphs, and the machine's peaks by which a time is judged."""

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
import torch.utils.mkldnn

import script_kernels
from bench import least_work, peak
from script_kernels import _core

Variant = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20th and 80th percentiles over `rounds` rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Reached in this run: flop/s per dtype and by what, byte/s of a copy (read + write) and which. They are what the
    floors are measured from. Multiply-adds alone no program beats, but for what the clock does; a product or a copy may
    be beaten."""

    flops: dict[torch.dtype, float]
    products: dict[torch.dtype, str]
    bandwidth: float
    copy: str

    def floor(self, flops: float, traffic: float, dtype: torch.dtype) -> tuple[float, float]:
        """(seconds for the flops, seconds for the bytes), each on its own: the larger one counts."""
        return flops / self.flops[dtype], traffic / self.bandwidth

    def origin(self, dtype: torch.dtype) -> str:
        rate = f"{self.products[dtype]} {self.flops[dtype] / 1e9:.0f} Gflop/s"
        return f"{rate}, {self.copy} {self.bandwidth / 1e9:.1f} GB/s"


def quantiles(samples: list[float]) -> Timing:
    """Order statistics without interpolation, so that each figure is one that was measured."""
    ordered = sorted(samples)
    p20, median, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(median, p20, p80, len(ordered))


class Clock:
    """Times `calls` calls in a row; on CUDA by events, with the L2 cache overwritten before."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def __call__(self, variant: Variant, calls: int) -> float:
        if self.flush is None:
            start = time.perf_counter()
            for _ in range(calls):
                variant()
            return (time.perf_counter() - start) / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        total = 0.0
        for _ in range(calls):
            self.flush.zero_()
            begin.record()
            variant()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) * 1e-3
        return total / calls


def interleave(
    variants: dict[str, Variant], device: torch.device, *, seconds: float = 1.0, max_rounds: int = 60
) -> dict[str, Timing]:
    """Time the variants in turn (a, b, ..., a, b, ...), so that a drift of the machine meets all of them alike.

    Each variant runs twice unmeasured first. A short variant is repeated within its turn until the turn takes about
    2 ms. The number of rounds is what fits in `seconds` per variant on average, within 3 and `max_rounds`.
    """
    clock = Clock(device)
    calls: dict[str, int] = {}
    once = 0.0
    for name, variant in variants.items():
        clock(variant, 1)
        estimate = clock(variant, 1)
        calls[name] = max(1, min(1000, int(2e-3 / max(estimate, 1e-9))))
        once += estimate * calls[name]
    rounds = int(max(3, min(max_rounds, seconds * len(variants) / once)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        # A new starting variant each round: nobody always runs after the same neighbour's cache.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(clock(variants[name], calls[name]))
    return {name: quantiles(times) for name, times in samples.items()}


def captured(call: Variant) -> Variant:
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


def linear_product(size: int) -> Variant:
    """A float32 product of size x size matrices by oneDNN, whose kernels use wider vectors than MKL's on some CPUs."""
    layer = torch.utils.mkldnn.to_mkldnn(torch.nn.Linear(size, size).eval())
    tokens = torch.randn(size, size).to_mkldnn()
    return lambda: layer(tokens)


def own_rates(tokens: torch.Tensor, clock: Clock) -> list[tuple[float, str]]:
    """(flop/s, name) of our product, with all that bipartite_match does besides, and of multiply-adds alone."""
    known = str(tokens.dtype).removeprefix("torch.")
    count, width = tokens.shape
    work = least_work.bipartite_match_work(1, count, width, tokens.element_size())
    matched = min(clock(lambda: script_kernels.bipartite_match(tokens[None]), 1) for _ in range(8))
    found = [(work.flops / matched, f"{known} bipartite_match of {count}")]
    alone = peak.measure(_core.build_info()["simd"], known)
    if alone is not None:
        found.append((alone.flops * torch.get_num_threads(), f"{known} {alone.name}"))
    return found


def measure_peaks(device: torch.device, *, size: int, copy_bytes: int) -> Peaks:
    """The best of several products (per dtype) and of several copies; on a CPU also what its vector units take."""
    clock = Clock(device)
    flops, products = {}, {}
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    for dtype in dtypes:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        known = str(dtype).removeprefix("torch.")
        tried: dict[str, Variant] = {f"{known} torch.mm of {size}": functools.partial(torch.mm, left, right)}
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            tried[f"{known} oneDNN linear of {size}"] = linear_product(size)
        rates = [(2.0 * size**3 / clock(product, 1), name) for name, product in tried.items() for _ in range(8)]
        if device.type == "cpu":
            rates += own_rates(left, clock)
        flops[dtype], products[dtype] = max(rates)
    # The CPU widens fp16.
    flops.setdefault(torch.float16, flops[torch.float32])
    products.setdefault(torch.float16, products[torch.float32])
    source = torch.zeros(copy_bytes // 4, device=device)
    target = torch.ones_like(source)
    best = min(clock(lambda: target.copy_(source), 1) for _ in range(8))
    return Peaks(flops, products, 2.0 * source.nbytes / best, f"copy of {copy_bytes >> 20} MiB")
