"""pytest-benchmark cases: python -m pytest bench, with its options (--benchmark-compare, -k qcsp, ...).

Each op at each shape, ours next to script_kernels.reference; the gate comes before the time.
"""

from collections.abc import Iterator

import pytest
import torch

from bench.cases import DTYPES, OPS, ROWS, Case, Inputs, Row, make_case

WIDTH = 1024
SLOW_REFERENCE = 2880  # from here on the reference takes seconds: it is left to python -m bench


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module", params=("float32", "bfloat16"))
def inputs(request: pytest.FixtureRequest, row: Row) -> Inputs:
    return Inputs(row, WIDTH, DTYPES[request.param], torch.device("cpu"), "powerlaw")


@pytest.fixture(scope="module", params=OPS)
def case(request: pytest.FixtureRequest, inputs: Inputs) -> Case:
    made = make_case(request.param, inputs)
    made.gate()
    return made


@pytest.mark.parametrize("variant", ["ours", "reference"])
def test_op(benchmark, case: Case, variant: str) -> None:  # type: ignore[no-untyped-def]
    if variant == "reference" and case.inputs.row.tokens >= SLOW_REFERENCE:
        pytest.skip("the reference takes seconds at this shape")
    benchmark.group = f"{case.op} {case.inputs.row.name} {case.inputs.dtype}"
    benchmark(case.ours if variant == "ours" else case.oracle)
