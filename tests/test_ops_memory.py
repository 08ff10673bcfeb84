"""What the ops do to memory: every output element is written, inputs and their neighbours are left alone, nothing leaks
from one call into the next."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import LAYOUTS, OPS, arguments, dtypes_of, outputs, tensors
from torch import Tensor

import script_kernels

SIZES = [(2, 1), (1, 2), (3, 16), (2, 63), (2, 64), (2, 65), (1, 130)]  # B, N


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is full of NaN, of the largest integer, or of True: what an op does not write stays recognisable."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def call(name: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    return outputs(getattr(script_kernels, name)(**values))


def assert_written(name: str, values: dict[str, Any], results: tuple[Tensor, ...]) -> None:
    """No poison in the outputs. A mask may hold True anywhere: its count tells."""
    for result in results:
        if result.is_floating_point():
            assert bool(result.isfinite().all())
        elif result.dtype != torch.bool:
            assert not bool((result == torch.iinfo(result.dtype).max).any())
        else:
            assert result.sum(1).tolist() == [values["keep"]] * result.shape[0]


def test_the_poison_works(poison: None) -> None:
    assert bool(torch.empty(7).isnan().all())
    assert bool((torch.empty(7, dtype=torch.int64) == torch.iinfo(torch.int64).max).all())
    assert bool(torch.empty(7, dtype=torch.bool).all())
    values = {"keep": 3}
    for unwritten in (torch.empty(2, 5), torch.empty(2, 5, dtype=torch.int32), torch.empty(2, 5, dtype=torch.bool)):
        with pytest.raises(AssertionError):
            assert_written("gsp", values, (unwritten,))


@pytest.mark.parametrize("name", OPS)
def test_every_output_element_is_written(name: str, poison: None, device: str) -> None:
    for dtype in dtypes_of(name):
        for B, N in SIZES:
            values = arguments(name, dtype, B=B, N=N, device=device)
            assert_written(name, values, call(name, values))


@pytest.mark.parametrize("fill", [0.0, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPS)
def test_every_output_element_is_written_for_odd_values(name: str, fill: float, poison: None, device: str) -> None:
    """Exhausted ranks, bad tokens and early ends take other paths."""
    for dtype in dtypes_of(name):
        for B, N in SIZES:
            values = arguments(name, dtype, B=B, N=N, device=device)
            for key, value in tensors(values).items():
                if value.is_floating_point():
                    values[key] = torch.full_like(value, fill)
            values.update({"rounds": 3} if name == "gsp" else {})
            assert_written(name, values, call(name, values))


@pytest.mark.parametrize("combine", ["intersect", "restrict"])
@given(B=st.integers(0, 3), N=st.integers(1, 70), D=st.integers(1, 9), data=st.data())
def test_prune_writes_every_element(combine: str, B: int, N: int, D: int, data: st.DataObject) -> None:
    values = arguments("prune", B=B, N=N, D=D)
    values["keep"] = data.draw(st.integers(1, N), label="keep")
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        kept = script_kernels.prune(**values, combine=combine)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert kept.shape == (B, values["keep"])
    assert kept.numel() == 0 or (int(kept.min()) >= 0 and int(kept.max()) < N)
    assert bool((kept[:, 1:] > kept[:, :-1]).all())


def buffer_of(view: Tensor) -> Tensor:
    """The whole storage behind a view, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_inputs_and_their_neighbours_are_untouched(name: str, layout: str, device: str) -> None:
    for dtype in dtypes_of(name):
        values = arguments(name, dtype, layout, device=device)
        before = {key: buffer_of(value).clone() for key, value in tensors(values).items()}
        versions = {key: value._version for key, value in tensors(values).items()}
        call(name, values)
        for key, value in tensors(values).items():
            assert torch.equal(buffer_of(value), before[key]), (key, dtype)
            assert value._version == versions[key], (key, dtype)


@pytest.mark.parametrize("name", OPS)
def test_outputs_are_new_memory_of_their_own(name: str, device: str) -> None:
    values = arguments(name, device=device)
    results = call(name, values)
    storages = [tensor.untyped_storage() for tensor in (*results, *tensors(values).values())]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for result in results:
        assert result.is_contiguous()
        assert result.storage_offset() == 0
        assert result.untyped_storage().nbytes() == result.numel() * result.element_size()


@pytest.mark.parametrize("name", OPS)
def test_a_call_leaves_nothing_for_the_next(name: str, device: str) -> None:
    """Workspaces live on from call to call: what an earlier, larger call of bad values left there must not show."""
    for dtype in dtypes_of(name):
        values = arguments(name, dtype, B=3, N=70, device=device)
        first = call(name, values)
        for fill in (float("nan"), 3e4, -1.0):
            for other in OPS:
                spoiler = arguments(other, dtype, B=4, N=150, D=33, device=device)
                for key, value in tensors(spoiler).items():
                    if value.is_floating_point():
                        spoiler[key] = torch.full_like(value, fill)
                call(other, spoiler)
            for got, want in zip(call(name, values), first, strict=True):
                assert torch.equal(got, want), (dtype, fill)


def heap_bytes() -> int:
    """What malloc has handed out and not got back."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")

    class MallInfo(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t) for name in ("arena", "o", "s", "hblks", "hblkhd", "u", "f", "uord", "fo", "k")
        ]

    libc.mallinfo2.restype = MallInfo
    info = libc.mallinfo2()
    return int(info.uord) + int(info.hblkhd)


def growth(call: Callable[[], Any], calls: int = 400) -> float:
    """Bytes that a call leaves behind: the least of three series, since a leak shows in each and whatever else the
    process takes once, such as for a table that grows, in one."""
    series = []
    for _ in range(3):
        for _ in range(20):
            call()
        gc.collect()
        before = heap_bytes()
        for _ in range(calls):
            call()
        gc.collect()
        series.append((heap_bytes() - before) / calls)
    return min(series)


def refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        getattr(torch.ops.script, name)(**values)


@pytest.mark.parametrize("name", OPS)
def test_a_call_leaves_no_memory_behind(name: str) -> None:
    """Called as an op, so that the arguments go through the stable ABI."""
    values = arguments(name)
    op = getattr(torch.ops.script, name)
    assert growth(lambda: op(**values)) < 1
    wrong = {**values, next(iter(values)): torch.zeros(3, dtype=torch.int8)}
    assert growth(lambda: refused(name, wrong)) < 1


@pytest.mark.parametrize("name", ["prune", "prune_varlen"])
def test_a_string_leaves_no_memory_behind(name: str) -> None:
    values = arguments(name)
    assert growth(lambda: getattr(torch.ops.script, name)(**values, combine="restrict")) < 1
    assert growth(lambda: refused(name, {**values, "combine": "x" * 4096})) < 1


def test_a_leak_is_seen() -> None:
    left = []
    assert growth(lambda: left.append(bytearray(1000))) > 1000


@pytest.mark.parametrize("name", OPS)
def test_empty_batches(name: str, device: str) -> None:
    values = arguments(name, device=device)
    if name == "prune_varlen":
        values = {**values, "cu_seqlens": values["cu_seqlens"][:1], "keep": [], "query": values["query"][:1]}
        values |= {"tokens": values["tokens"][:0], "aligned": values["aligned"][:0]}
        assert call(name, values)[0].shape == (0,)
        return
    empty = {key: value[:0] if isinstance(value, Tensor) else value for key, value in values.items()}
    for got, like in zip(call(name, empty), call(name, values), strict=True):
        assert got.shape == (0, *like.shape[1:])
        assert got.dtype == like.dtype


@pytest.mark.parametrize("name", ["query_relevance", "bipartite_match"])
def test_no_tokens(name: str, device: str) -> None:
    values = arguments(name, device=device)
    values["tokens"] = values["tokens"][:, :0]
    for result in call(name, values):
        assert result.shape == (2, 0)
