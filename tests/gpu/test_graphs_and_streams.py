"""The ops in CUDA graphs, on other streams and devices, under torch.compile: no bit of a result may change."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from gpu_calls import Call

import script_kernels
from script_kernels import testing


@contextlib.contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_no_host_synchronisation(call: Call) -> None:
    tensors = call.make(0)
    call.results(*tensors)  # the first call compiles and loads
    with syncs_are_errors():
        call.results(*tensors)


def test_the_sync_check_sees_a_sync() -> None:
    ones = torch.ones(3, device="cuda")
    with syncs_are_errors(), pytest.raises(RuntimeError, match="synchroniz"):
        ones.nonzero()


def test_a_captured_graph_follows_its_inputs(call: Call) -> None:
    static = call.make(0)
    call.results(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call.results(*static)
    for seed in (1, 2):
        fresh = call.make(seed)
        for buffer, values in zip(static, fresh, strict=True):
            buffer.copy_(values)
        for output in outputs:
            output.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(outputs, call.results(*fresh))


def test_work_waits_for_its_own_stream(call: Call) -> None:
    """The inputs are written late on a side stream: a launch on another stream would read what was there before."""
    late = call.make(1)
    expected = call.results(*late)
    inputs = [torch.zeros_like(values) for values in late]
    call.results(*inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for buffer, values in zip(inputs, late, strict=True):
            buffer.copy_(values)
        found = call.results(*inputs)
    side.synchronize()
    assert_same(found, expected)


def test_compiled_with_reduced_overhead(call: Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: call.results(*tensors), mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        tensors = call.make(seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = [output.clone() for output in compiled(*tensors)]
        assert_same(found, call.results(*tensors))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used_and_the_callers_restored(call: Call) -> None:
    tensors = call.make(0)
    expected = call.results(*tensors)
    with torch.cuda.device(0):
        found = call.results(*(tensor.to("cuda:1") for tensor in tensors))
        assert torch.cuda.current_device() == 0
    assert all(output.device == torch.device("cuda:1") for output in found)
    assert_same([output.cpu() for output in found], [output.cpu() for output in expected])


def test_the_current_device_and_stream_stay(call: Call) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        before = torch.cuda.current_device()
        call.results(*call.make(0))
        assert torch.cuda.current_stream() == side
        assert torch.cuda.current_device() == before
    torch.cuda.synchronize()


def test_tensors_on_the_cpu_and_the_gpu_are_refused() -> None:
    x = testing.make_tokens("gaussian", 1, 16, 8, device="cuda")
    with pytest.raises(ValueError, match="relevance: expected the device of tokens, cuda:0, got cpu"):
        script_kernels.qcsp(x, torch.ones(1, 16), 4)
    ranking = torch.arange(16)[None]
    mask = torch.ones(1, 16, dtype=torch.bool, device="cuda")
    with pytest.raises(RuntimeError, match="mask: expected the device of ranking"):
        torch.ops.script.mask_intersect(ranking, mask, 4)
