from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]
# negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce
_Options = tuple[bool, float, float, str, float, float, int, int, float, float, str]

def build_info() -> dict[str, str]: ...
def query_relevance(
    tokens: _Array, query: _Array, query_mask: _Array | None, negate: bool, reduce: str, threads: int
) -> _Array: ...
def bipartite_match(
    tokens: _Array, threshold: float, threads: int
) -> tuple[_Array, _Array, _Array, _Array, _Array]: ...
def gsp(
    tokens: _Array, keep: int, threshold: float, gamma: float, min_degree: int, rounds: int, threads: int
) -> tuple[_Array, _Array]: ...
def dpp_map(kernel: _Array, k: int, threads: int) -> tuple[_Array, _Array]: ...
def qcsp(
    tokens: _Array, relevance: _Array, k: int, power: float, normalize: bool, ridge: float, threads: int
) -> tuple[_Array, _Array]: ...
def max_min(tokens: _Array, relevance: _Array | None, k: int, threads: int) -> tuple[_Array, _Array]: ...
def mmr(tokens: _Array, relevance: _Array, k: int, balance: float, threads: int) -> tuple[_Array, _Array]: ...
def mask_intersect(ranking: _Array, mask: _Array, k: int, threads: int) -> _Array: ...
def prune(
    tokens: _Array,
    query: _Array | None,
    keep: int,
    aligned: _Array | None,
    query_mask: _Array | None,
    options: _Options,
    split: str,
    grid_width: int | None,
    threads: int,
) -> _Array: ...
def prune_varlen(
    tokens: _Array,
    starts: list[int],
    query: _Array | None,
    keep: list[int],
    aligned: _Array | None,
    options: _Options,
    threads: int,
) -> _Array: ...
