"""Every bad argument is named, with what was expected and what came: in the public functions, the ops and the fakes."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from op_cases import OPS, arguments, outputs
from torch import Tensor

import script_kernels
from script_kernels import options

Change = Callable[[Any], Any]


class Bad(NamedTuple):
    """A call that must fail: the valid one of op_cases.py (B 2, N 19, D 12, Q 3, k 6), with some arguments changed."""

    op: str
    change: dict[str, Any]  # a function is applied to the valid argument
    message: str
    kind: type[Exception] = ValueError  # of the public function and the fake; the op itself raises RuntimeError
    values: bool = False  # only told from a tensor's values, so not by a fake


def to(dtype: torch.dtype) -> Change:
    return lambda x: x.to(dtype)


def tokens_cases(op: str) -> list[Bad]:
    shape = "(T, D)" if op == "prune_varlen" else "(B, N, D)"
    width = "29, 0" if op == "prune_varlen" else "2, 19, 0"
    cases = [
        Bad(op, {"tokens": to(dtype)}, f"tokens: expected float32, bfloat16 or float16, got {name}", TypeError)
        for dtype, name in (
            (torch.int64, "int64"),
            (torch.uint8, "uint8"),
            (torch.float64, "float64"),
            (torch.bool, "bool"),
        )
    ]
    cases += [
        Bad(op, {"tokens": lambda x: x[0]}, f"tokens: expected shape {shape} with D >= 1, got {{shape}}"),
        Bad(op, {"tokens": lambda x: x[None]}, f"tokens: expected shape {shape} with D >= 1, got {{shape}}"),
        Bad(op, {"tokens": lambda x: x[..., :0]}, f"tokens: expected shape {shape} with D >= 1, got ({width})"),
    ]
    return cases


def query_cases(op: str, batch: int, width: int) -> list[Bad]:
    expected = f"query: expected shape ({batch} or 1, Q >= 1, {width}), got {{shape}}"
    return [
        Bad(op, {"query": lambda x: x[0]}, expected),
        Bad(op, {"query": lambda x: x[:, :0]}, expected),
        Bad(op, {"query": lambda x: x[..., :-1]}, expected),
        Bad(op, {"query": lambda x: torch.cat([x, x])}, expected),
        Bad(op, {"query": to(torch.bfloat16)}, "query: expected float32, got bfloat16", TypeError),
    ]


def mask_cases(op: str) -> list[Bad]:
    expected = "query_mask: expected shape (2 or 1, 3), got {shape}"
    return [
        Bad(op, {"query_mask": lambda x: x[0]}, expected),
        Bad(op, {"query_mask": lambda x: x[:, :2]}, expected),
        Bad(op, {"query_mask": lambda x: torch.cat([x, x])}, expected),
        Bad(op, {"query_mask": to(torch.float32)}, "query_mask: expected bool, got float32", TypeError),
    ]


def count_cases(op: str, argument: str, limit_name: str, limit: int) -> list[Bad]:
    expected = f"{argument}: expected 1 <= {argument} <= {limit_name} = {limit}, got "
    return [Bad(op, {argument: bad}, f"{expected}{bad}") for bad in (0, -3, limit + 1)]


def gsp_cases(op: str) -> list[Bad]:
    return [
        Bad(op, {"threshold": math.nan}, "threshold: expected a finite number, got nan"),
        Bad(op, {"threshold": math.inf}, "threshold: expected a finite number, got inf"),
        Bad(op, {"gamma": -math.inf}, "gamma: expected a finite number, got -inf"),
        Bad(op, {"min_degree": -1}, "min_degree: expected min_degree >= 0, got -1"),
        Bad(op, {"rounds": 0}, "rounds: expected rounds >= 1, got 0"),
        Bad(op, {"rounds": 101}, "rounds: expected rounds <= 100, got 101"),
        Bad(op, {"rounds": 2**62}, f"rounds: expected rounds <= 100, got {2**62}"),
    ]


def prune_cases(op: str, width: str) -> list[Bad]:
    return [
        Bad(op, {"gsp_drop": 1.5}, "gsp_drop: expected 0 <= gsp_drop < 1, got 1.5"),
        Bad(op, {"gsp_drop": -0.5}, "gsp_drop: expected 0 <= gsp_drop < 1, got -0.5"),
        Bad(op, {"gsp_drop": math.nan}, "gsp_drop: expected 0 <= gsp_drop < 1, got nan"),
        Bad(op, {"oversample": 0.5}, "oversample: expected a finite number >= 1, got 0.5"),
        Bad(op, {"oversample": math.inf}, "oversample: expected a finite number >= 1, got inf"),
        Bad(op, {"oversample": math.nan}, "oversample: expected a finite number >= 1, got nan"),
        Bad(op, {"floor": -0.1}, "floor: expected 0 <= floor <= 1, got -0.1"),
        Bad(op, {"floor": 1.5}, "floor: expected 0 <= floor <= 1, got 1.5"),
        Bad(op, {"floor": math.nan}, "floor: expected 0 <= floor <= 1, got nan"),
        Bad(op, {"combine": "both"}, "combine: expected 'intersect', 'restrict' or 'union', got 'both'"),
        Bad(op, {"combine": ""}, "combine: expected 'intersect', 'restrict' or 'union', got ''"),
        Bad(op, {"reduce": "sum"}, "reduce: expected 'mean' or 'max', got 'sum'"),
        *power_cases(op),
        Bad(op, {"aligned": lambda x: x[0]}, f"aligned: expected shape {width} with C >= 1, got {{shape}}"),
        Bad(op, {"aligned": lambda x: x[..., :0]}, f"aligned: expected shape {width} with C >= 1, got {{shape}}"),
        Bad(op, {"aligned": lambda x: x[:-1]}, f"aligned: expected shape {width} with C >= 1, got {{shape}}"),
        Bad(op, {"aligned": to(torch.float16)}, "aligned: expected float32, got float16", TypeError),
        Bad(op, {"aligned": to(torch.int32)}, "aligned: expected float32, got int32", TypeError),
    ]


def power_cases(op: str) -> list[Bad]:
    return [Bad(op, {"power": bad}, f"power: expected 0 <= power <= 64, got {bad}") for bad in (-0.5, 65.5, math.nan)]


UNREACHABLE = "cannot be reached with rounds = {} (a round drops at most half); needs rounds >= {}"
ELSEWHERE = "{}: expected the device of {}, cpu, got meta"

CASES = [
    *[case for op in OPS if op not in ("dpp_map", "mask_intersect") for case in tokens_cases(op)],
    *query_cases("query_relevance", 2, 12),
    *query_cases("prune", 2, 12),
    *query_cases("prune_varlen", 3, 12),
    *mask_cases("query_relevance"),
    *mask_cases("prune"),
    *count_cases("gsp", "keep", "N", 19),
    *count_cases("dpp_map", "k", "N", 19),
    *count_cases("qcsp", "k", "N", 19),
    *count_cases("max_min", "k", "N", 19),
    *count_cases("mmr", "k", "N", 19),
    *count_cases("mask_intersect", "k", "P", 12),
    *count_cases("prune", "keep", "N", 19),
    *gsp_cases("gsp"),
    *gsp_cases("prune"),
    *gsp_cases("prune_varlen"),
    *power_cases("qcsp"),
    Bad("query_relevance", {"reduce": "least"}, "reduce: expected 'mean' or 'max', got 'least'"),
    *[
        Bad("qcsp", {"ridge": bad}, f"ridge: expected a finite number >= 0, got {bad}")
        for bad in (-0.5, math.inf, math.nan)
    ],
    *[Bad("mmr", {"balance": bad}, f"balance: expected 0 <= balance <= 1, got {bad}") for bad in (-0.5, 1.5, math.nan)],
    *prune_cases("prune", "(2, 19, C)"),
    *prune_cases("prune_varlen", "(29, C)"),
    Bad("bipartite_match", {"threshold": math.nan}, "threshold: expected a finite number, got nan"),
    # keep and the rounds it takes
    Bad("gsp", {"keep": 8}, f"keep: 8 of N = 19 tokens {UNREACHABLE.format(1, 2)}"),
    Bad("gsp", {"keep": 1}, f"keep: 1 of N = 19 tokens {UNREACHABLE.format(1, 7)}"),
    Bad("gsp", {"keep": 4, "rounds": 2}, f"keep: 4 of N = 19 tokens {UNREACHABLE.format(2, 3)}"),
    Bad("prune", {"gsp_drop": 0.75}, f"gsp_drop: 0.75 keeps 5, which of N = 19 tokens {UNREACHABLE.format(1, 3)}"),
    # widths
    Bad(
        "prune",
        {"aligned": None, "query": lambda x: x[..., :5]},
        "query: expected shape (2 or 1, Q >= 1, 12), got (2, 3, 5)",
    ),
    Bad("prune", {"aligned": lambda x: x[..., :5]}, "query: expected shape (2 or 1, Q >= 1, 5), got (2, 3, 12)"),
    Bad("prune", {"aligned": lambda x: x[:, :18]}, "aligned: expected shape (2, 19, C) with C >= 1, got (2, 18, 12)"),
    # relevance
    Bad("qcsp", {"relevance": lambda x: x[:1]}, "relevance: expected shape (2, 19), got (1, 19)"),
    Bad("qcsp", {"relevance": lambda x: x[:, 1:]}, "relevance: expected shape (2, 19), got (2, 18)"),
    Bad("qcsp", {"relevance": lambda x: x[0]}, "relevance: expected shape (2, 19), got (19,)"),
    Bad("qcsp", {"relevance": to(torch.float64)}, "relevance: expected float32, got float64", TypeError),
    # kernel
    Bad("dpp_map", {"kernel": lambda x: x[:, 1:]}, "kernel: expected shape (B, N, N), got (2, 18, 19)"),
    Bad("dpp_map", {"kernel": lambda x: x[0]}, "kernel: expected shape (B, N, N), got (19, 19)"),
    Bad("dpp_map", {"kernel": to(torch.bfloat16)}, "kernel: expected float32, got bfloat16", TypeError),
    # mask_intersect
    Bad("mask_intersect", {"ranking": to(torch.int32)}, "ranking: expected int64, got int32", TypeError),
    Bad("mask_intersect", {"ranking": lambda x: x[0]}, "ranking: expected shape (B, P), got (12,)"),
    Bad("mask_intersect", {"mask": to(torch.uint8)}, "mask: expected bool, got uint8", TypeError),
    Bad("mask_intersect", {"mask": lambda x: x[:1]}, "mask: expected shape (2, N), got (1, 19)"),
    Bad("mask_intersect", {"mask": lambda x: x[0]}, "mask: expected shape (2, N), got (19,)"),
    Bad("mask_intersect", {"mask": lambda x: x[:, :11]}, "ranking: expected P <= N = 11, got P = 12"),
    # cu_seqlens and keep
    Bad("prune_varlen", {"cu_seqlens": to(torch.int64)}, "cu_seqlens: expected int32, got int64", TypeError),
    Bad("prune_varlen", {"cu_seqlens": lambda x: x[:0]}, "cu_seqlens: expected shape (S + 1,), got (0,)"),
    Bad("prune_varlen", {"cu_seqlens": lambda x: x[None]}, "cu_seqlens: expected shape (S + 1,), got (1, 4)"),
    Bad("prune_varlen", {"keep": [6, 0]}, "keep: expected one count per segment, S = 3, got 2 counts"),
]


def giant(tensor: Tensor, dim: int, size: int = 2**31) -> Tensor:
    """A view of stride 0 that claims `size` entries along `dim`, all of them the first."""
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.narrow(dim, 0, 1).expand(shape)


SIZES = f"expected sizes up to {2**24}, got {{shape}}"
CASES += [
    *[
        Bad(op, {name: lambda x, dim=dim: giant(x, dim)}, f"{name}: {SIZES}")
        for op, name, dims in (
            ("query_relevance", "tokens", (0, 1, 2)),
            ("bipartite_match", "tokens", (0, 1, 2)),
            ("gsp", "tokens", (0, 1, 2)),
            ("qcsp", "tokens", (0, 1, 2)),
            ("max_min", "tokens", (0, 1, 2)),
            ("mmr", "tokens", (0, 1, 2)),
            ("prune", "tokens", (0, 1, 2)),
            ("prune_varlen", "tokens", (0, 1)),
        )
        for dim in dims
    ],
    Bad("dpp_map", {"kernel": lambda x: giant(giant(x, 1, 2**25), 2, 2**25)}, f"kernel: {SIZES}"),
    Bad("mask_intersect", {"mask": lambda x: giant(x, 1)}, f"mask: {SIZES}"),
    Bad("mask_intersect", {"ranking": lambda x: giant(x, 1)}, f"ranking: {SIZES}"),
    Bad("query_relevance", {"query": lambda x: giant(x, 1), "query_mask": None}, "query: " + SIZES),
]


def starts(*values: int) -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor(values, dtype=torch.int32)}


VALUE_CASES = [
    Bad("prune_varlen", starts(1, 19, 19, 29), "cu_seqlens: expected a start at 0, got 1", values=True),
    Bad("prune_varlen", starts(0, 19, 18, 29), "cu_seqlens: expected ascending values, got 18 after 19", values=True),
    Bad("prune_varlen", starts(0, 19, 19, 28), "cu_seqlens: expected an end at T = 29, got 28", values=True),
    Bad("prune_varlen", starts(0, 19, 19, 30), "cu_seqlens: expected an end at T = 29, got 30", values=True),
    Bad("prune_varlen", {"keep": [6, 1, 1]}, "keep[1]: expected 0 for an empty segment, got 1", values=True),
    Bad(
        "prune_varlen",
        {"keep": [0, 0, 1]},
        "keep[0]: expected 1 <= keep[0] <= 19, the segment's length, got 0",
        values=True,
    ),
    Bad(
        "prune_varlen",
        {"keep": [6, 0, 11]},
        "keep[2]: expected 1 <= keep[2] <= 10, the segment's length, got 11",
        values=True,
    ),
    Bad(
        "prune_varlen",
        {"gsp_drop": 0.75},
        f"gsp_drop: 0.75 keeps 5, which of N = 19 tokens {UNREACHABLE.format(1, 3)}",
        values=True,
    ),
]


def build(case: Bad) -> tuple[dict[str, Any], str]:
    """The arguments, and the message with the shape that came filled in."""
    values = arguments(case.op)
    message = case.message
    for key, change in case.change.items():
        values[key] = change(values[key]) if callable(change) else change
        if "{shape}" in message:
            message = message.replace("{shape}", str(tuple(values[key].shape)))
    return values, message


def named(case: Bad) -> str:
    return f"{case.op}-{case.message[:60]}"


@pytest.mark.parametrize("case", CASES + VALUE_CASES, ids=named)
def test_public_function(case: Bad) -> None:
    values, message = build(case)
    with pytest.raises(case.kind) as caught:
        getattr(script_kernels, case.op)(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("case", CASES + VALUE_CASES, ids=named)
def test_op_itself(case: Bad) -> None:
    values, message = build(case)
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.script, case.op)(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("case", CASES, ids=named)
def test_fake(case: Bad) -> None:
    values, message = build(case)
    values = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in values.items()}
    with pytest.raises(case.kind) as caught:
        getattr(torch.ops.script, case.op)(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "argument", "like"),
    [
        ("query_relevance", "query", "tokens"),
        ("query_relevance", "query_mask", "tokens"),
        ("qcsp", "relevance", "tokens"),
        ("mask_intersect", "mask", "ranking"),
        ("prune", "query", "tokens"),
        ("prune", "query_mask", "tokens"),
        ("prune", "aligned", "tokens"),
        ("prune_varlen", "cu_seqlens", "tokens"),
        ("prune_varlen", "query", "tokens"),
        ("prune_varlen", "aligned", "tokens"),
    ],
)
def test_another_device(name: str, argument: str, like: str) -> None:
    values = arguments(name)
    values[argument] = values[argument].to("meta")
    with pytest.raises(ValueError, match=re.escape(ELSEWHERE.format(argument, like))):
        getattr(script_kernels, name)(**values)


DENSE = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "a nested tensor": lambda x: torch.nested.nested_tensor(list(x)),
}


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "argument", "kind"),
    [
        (name, argument, kind)
        for name, argument in [
            *[(name, "tokens") for name in OPS if name not in ("dpp_map", "mask_intersect")],
            ("dpp_map", "kernel"),
            ("query_relevance", "query"),
            ("prune", "aligned"),
            ("prune_varlen", "query"),
        ]
        for kind in [*DENSE, "jagged"]
        if (name, argument, kind) != ("prune_varlen", "tokens", "jagged")  # rows alone cannot be ragged
    ],
)
def test_tensors_that_are_not_dense(name: str, argument: str, kind: str) -> None:
    values = arguments(name)
    change = DENSE.get(kind, jagged)
    values[argument] = change(values[argument])
    with pytest.raises(TypeError) as caught:
        getattr(script_kernels, name)(**values)
    assert str(caught.value) == f"{argument}: expected a dense tensor, got {kind.replace('jagged', 'a nested tensor')}"


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_is_named() -> None:
    tokens = torch.quantize_per_tensor(torch.randn(1, 6, 4), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"^tokens: expected float32, bfloat16 or float16, got quint8$"):
        script_kernels.prune(tokens, None, 2)


def test_what_no_round_can_reach() -> None:
    message = (
        "keep: 3 of N = 4000 tokens cannot be reached with rounds = {} (a round drops at most half), nor with any "
    )
    message += "rounds <= 100"
    tokens = torch.zeros(1, 4000, 1)
    for rounds in (1, 100):
        for call, kind in ((script_kernels.gsp, ValueError), (torch.ops.script.gsp, RuntimeError)):
            with pytest.raises(kind) as caught:
                call(tokens, 3, rounds=rounds)
            assert str(caught.value) == message.format(rounds)
    assert int(script_kernels.gsp(tokens, 40, rounds=100)[0].sum()) == 40


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prune", {"tokens": [[1.0]]}, "tokens: expected a torch.Tensor, got list"),
        ("prune", {"query": 3}, "query: expected a torch.Tensor, got int"),
        ("prune", {"keep": 3.0}, "keep: expected an int, got float"),
        ("prune", {"keep": True}, "keep: expected an int, got bool"),
        ("prune", {"rounds": 1.0}, "rounds: expected an int, got float"),
        ("prune", {"gsp_drop": "a quarter"}, "gsp_drop: expected a float, got str"),
        ("prune", {"oversample": None}, "oversample: expected a float, got NoneType"),
        ("prune", {"combine": 1}, "combine: expected a str, got int"),
        ("gsp", {"threshold": "0.2"}, "threshold: expected a float, got str"),
        ("gsp", {"min_degree": 4.0}, "min_degree: expected an int, got float"),
        ("prune_varlen", {"keep": 6}, "keep: expected a sequence of ints, got int"),
        ("prune_varlen", {"keep": [6, 0, 1.0]}, "keep[2]: expected an int, got float"),
        ("prune_varlen", {"keep": torch.tensor([6, 0, 1])}, "keep: expected a sequence of ints, got Tensor"),
    ],
)
def test_wrong_python_types(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(script_kernels, name)(**{**arguments(name), **change})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (25, "ranking: expected distinct indices in [0, N = 19), got 25"),
        (-1, "ranking: expected distinct indices in [0, N = 19), got -1"),
        (None, "ranking: expected distinct indices in [0, N = 19), got {} twice"),
    ],
)
@pytest.mark.parametrize("batch", [2, 64])
def test_ranking_values(entry: int | None, message: str, batch: int) -> None:
    """Found while working, in whichever thread: it reaches the caller as it was raised."""
    values = arguments("mask_intersect", B=batch)
    ranking = values["ranking"]
    ranking[-1, 7] = ranking[-1, 2] if entry is None else entry
    with pytest.raises(RuntimeError) as caught:
        script_kernels.mask_intersect(**values)
    assert str(caught.value) == message.format(int(ranking[-1, 2]))


def test_rounds_needed_is_the_smallest_that_suffices() -> None:
    for n in (1, 2, 3, 7, 20, 33):
        for keep in range(1, n + 1):
            sufficient = [rounds for rounds in range(1, n + 2) if simulate(n, keep, rounds)]
            assert [rounds for rounds in range(1, n + 2) if options.rounds_suffice(n, keep, rounds)] == sufficient
            assert options.rounds_needed(n, keep) == sufficient[0], (n, keep)


def simulate(n: int, keep: int, rounds: int) -> bool:
    """GSP's rounds on a list: the even positions are the sources."""
    survivors = list(range(n))
    for r in range(rounds):
        quota = math.ceil((len(survivors) - keep) / (rounds - r))
        if quota > len(survivors[::2]):
            return False
        survivors = survivors[quota:]
    return len(survivors) == keep


def test_the_op_says_the_same_number_of_rounds() -> None:
    for n in (2, 9, 20):
        tokens = torch.randn(1, n, 4)
        for keep in range(1, n + 1):
            needed = options.rounds_needed(n, keep)
            mask, _ = torch.ops.script.gsp(tokens, keep, rounds=needed)
            assert int(mask.sum()) == keep
            if needed > 1:
                with pytest.raises(RuntimeError, match=rf"needs rounds >= {needed}$"):
                    torch.ops.script.gsp(tokens, keep, rounds=1)


@pytest.mark.parametrize("name", OPS)
def test_the_valid_call_is_valid(name: str) -> None:
    assert len(outputs(getattr(script_kernels, name)(**arguments(name)))) >= 1
