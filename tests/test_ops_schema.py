"""The schemas are a contract: they are frozen here, and whatever repeats them must say the same."""

import dataclasses
import inspect
import re

import pytest
import torch
from op_cases import OPS

import script_kernels
from script_kernels import ops
from script_kernels.options import GspOptions, ImageOptions, PruneOptions, QcspOptions

FROZEN = """
query_relevance(Tensor tokens, Tensor query, Tensor? query_mask=None, *, bool negate=False, str reduce="mean")
      -> Tensor
bipartite_match(Tensor tokens, float threshold=0.2)
      -> (Tensor best, Tensor match, Tensor degree, Tensor mean, Tensor density)
gsp(Tensor tokens, SymInt keep, *, float threshold=0.2, float gamma=1.0, int min_degree=4, int rounds=1)
      -> (Tensor mask, Tensor redundancy)
dpp_map(Tensor kernel, SymInt k) -> (Tensor indices, Tensor gains)
qcsp(Tensor tokens, Tensor relevance, SymInt k, *, float power=1.0, bool normalize=True, float ridge=0.0)
      -> (Tensor indices, Tensor gains)
max_min(Tensor tokens, Tensor? relevance, SymInt k) -> (Tensor indices, Tensor gains)
mmr(Tensor tokens, Tensor relevance, SymInt k, *, float balance=0.5) -> (Tensor indices, Tensor gains)
mask_intersect(Tensor ranking, Tensor mask, SymInt k) -> Tensor
prune(Tensor tokens, Tensor? query, SymInt keep, *, Tensor? aligned=None, Tensor? query_mask=None, bool negate=False,
      float gsp_drop=0.25, float oversample=2.0, str combine="intersect", float threshold=0.2, float gamma=1.0,
      int min_degree=4, int rounds=1, float floor=0.0, float power=1.0, str reduce="mean", str split="raster",
      int? grid_width=None) -> Tensor
prune_varlen(Tensor tokens, Tensor cu_seqlens, Tensor? query, SymInt[] keep, *, Tensor? aligned=None, bool negate=False,
      float gsp_drop=0.25, float oversample=2.0, str combine="intersect", float threshold=0.2, float gamma=1.0,
      int min_degree=4, int rounds=1, float floor=0.0, float power=1.0, str reduce="mean") -> Tensor
"""
SCHEMAS = {text.partition("(")[0]: text for text in re.sub(r"\s*\n\s+", " ", FROZEN).strip().split("\n")}


def test_these_ops_and_no_others() -> None:
    assert tuple(SCHEMAS) == OPS == tuple(op.name for op in ops.OPS)
    assert set(script_kernels.__all__) == {*OPS, "__version__"}


@pytest.mark.parametrize("name", OPS)
def test_schema_is_frozen(name: str) -> None:
    packet = getattr(torch.ops.script, name)
    assert packet.overloads() == ["default"]
    assert packet.default._schema == torch._C.parse_schema(f"script::{SCHEMAS[name]}")
    assert str(packet.default._schema) == str(torch._C.parse_schema(f"script::{SCHEMAS[name]}"))
    assert torch.Tag.pt2_compliant_tag in packet.default.tags


@pytest.mark.parametrize("name", OPS)
def test_public_function_has_the_schema_s_arguments(name: str) -> None:
    arguments = getattr(torch.ops.script, name).default._schema.arguments
    parameters = inspect.signature(getattr(script_kernels, name)).parameters
    assert list(parameters) == [argument.name for argument in arguments]
    for argument, parameter in zip(arguments, parameters.values(), strict=True):
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        expected = argument.default_value if argument.has_default_value() else parameter.empty
        assert parameter.default == expected, argument.name


@pytest.mark.parametrize(
    ("name", "options"),
    [("gsp", GspOptions), ("qcsp", QcspOptions), ("prune", ImageOptions), ("prune_varlen", PruneOptions)],
)
def test_options_are_the_schema_s(name: str, options: type[GspOptions]) -> None:
    """Numbers, flags and strings of an op are the fields of its options, with the same defaults."""
    arguments = getattr(torch.ops.script, name).default._schema.arguments
    plain = {a.name: a.default_value for a in arguments if a.has_default_value() and "Tensor" not in str(a.type)}
    assert plain == {field.name: field.default for field in dataclasses.fields(options)}


@pytest.mark.parametrize("name", OPS)
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(script_kernels, name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert section in text, section
    described = re.search(r"Args:\n(.*?)\nReturns:", text, re.DOTALL)
    assert described is not None
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +([\w, ]+, )?{parameter}(, [\w, ]+)?: ", described[1], re.MULTILINE), parameter


def test_examples_run() -> None:
    import doctest

    from script_kernels import api

    results = doctest.testmod(api, extraglobs={"torch": torch, "script_kernels": script_kernels})
    assert results.failed == 0
    assert results.attempted >= 2 * len(OPS)
