"""torch.library.opcheck on every op, dtype and layout; nothing requires grad; the Python entry of the CUDA key."""

import importlib
import inspect
from typing import Any

import pytest
import torch
from op_cases import LAYOUTS, OPS, arguments, dtypes_of, outputs
from torch import Tensor

from script_kernels import ops

CASES = [
    pytest.param(name, dtype, layout, id=f"{name}-{str(dtype).removeprefix('torch.')}-{layout}")
    for name in OPS
    for dtype in dtypes_of(name)
    for layout in LAYOUTS
]


def split(name: str, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword-only arguments, as the dispatcher wants them."""
    schema = getattr(torch.ops.script, name).default._schema
    args = tuple(values[a.name] for a in schema.arguments if not a.kwarg_only and a.name in values)
    return args, {a.name: values[a.name] for a in schema.arguments if a.kwarg_only and a.name in values}


def with_grad(values: dict[str, Any]) -> dict[str, Any]:
    """Every floating tensor requires grad, in its layout."""
    return {
        key: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in values.items()
    }


@pytest.mark.parametrize(("name", "dtype", "layout"), CASES)
def test_opcheck(name: str, dtype: torch.dtype, layout: str, device: str) -> None:
    values = with_grad(arguments(name, dtype, layout, device=device))
    args, options = split(name, values)
    results = torch.library.opcheck(getattr(torch.ops.script, name).default, args, options)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize("name", OPS)
def test_layout_does_not_change_a_bit(name: str, device: str) -> None:
    op = getattr(torch.ops.script, name)
    for dtype in dtypes_of(name):
        values = arguments(name, dtype, "contiguous", device=device)
        expected = outputs(op(**values))
        for layout in ("transposed", "rows", "strided"):
            result = outputs(op(**arguments(name, dtype, layout, device=device)))
            for got, want in zip(result, expected, strict=True):
                assert got.dtype == want.dtype
                assert got.is_contiguous()
                assert torch.equal(got, want), (dtype, layout)


@pytest.mark.parametrize("name", OPS)
def test_nothing_requires_grad(name: str, device: str) -> None:
    values = with_grad(arguments(name, device=device))
    for output in outputs(getattr(torch.ops.script, name)(**values)):
        assert not output.requires_grad
        assert output.grad_fn is None
        if output.is_floating_point():
            with pytest.raises(RuntimeError, match="does not require grad"):
                output.sum().backward()


@pytest.mark.parametrize("name", [name for name in OPS if name != "mask_intersect"])
def test_cuda_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks, hands over every argument in order, and keeps autograd off."""
    seen: list[inspect.BoundArguments] = []
    real = getattr(importlib.import_module(f"script_kernels.triton.{name}"), f"launch_{name}")

    def launch(*values: Any, **named: Any) -> Tensor:
        seen.append(inspect.signature(real).bind(*values, **named))
        seen[-1].apply_defaults()
        return values[0] * 2

    monkeypatch.setattr(f"script_kernels.triton.{name}.launch_{name}", launch)
    schema = getattr(torch.ops.script, name).default._schema
    entry = ops._on_cuda(next(op for op in ops.OPS if op.name == name))
    values = with_grad(arguments(name))
    args, options = split(name, values)
    result = entry(*args, **options)
    assert not result.requires_grad
    assert torch.equal(result, args[0] * 2)
    given = seen[0].arguments
    for argument in schema.arguments:
        want = values.get(argument.name, argument.default_value)
        got = given[argument.name] if argument.name in given else getattr(given["options"], argument.name)
        assert got is want or got == want, argument.name
    bad = (args[0].double(), *args[1:])
    with pytest.raises(TypeError, match="got float64"):
        entry(*bad, **options)
    assert len(seen) == 1
