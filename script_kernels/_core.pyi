from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]

def build_info() -> dict[str, str]: ...
def query_relevance(tokens: _Array, query: _Array, query_mask: _Array | None, negate: bool) -> _Array: ...
def gsp(
    tokens: _Array, keep: int, threshold: float, gamma: float, min_degree: int, rounds: int
) -> tuple[_Array, _Array]: ...
def qcsp(tokens: _Array, relevance: _Array, k: int) -> tuple[_Array, _Array]: ...
def mask_intersect(ranking: _Array, mask: _Array, k: int) -> _Array: ...
def prune(
    tokens: _Array,
    query: _Array | None,
    keep: int,
    aligned: _Array | None,
    query_mask: _Array | None,
    negate: bool,
    gsp_drop: float,
    oversample: float,
    restrict: bool,
    threshold: float,
    gamma: float,
    min_degree: int,
    rounds: int,
) -> _Array: ...
