"""Checks of NumPy arrays, and how they and the options travel to `_core`: what the functions of `numpy.py` share."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .options import PruneOptions, check_int, check_sizes

Array = npt.NDArray[Any]


def is_array(value: object, argument: str) -> None:
    """An array, but none whose elements may be hidden: nothing here would look at its mask."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{argument}: expected a numpy.ndarray, got {type(value).__name__}")


def array(value: Array, argument: str, dtype: npt.DTypeLike) -> Array:
    """An array of this dtype whose strides are whole elements (a field of a record array is copied)."""
    is_array(value, argument)
    if value.dtype != dtype:
        raise TypeError(f"{argument}: expected {np.dtype(dtype).name}, got {value.dtype.name}")
    check_sizes(value.shape, argument)
    whole = value.flags.aligned and all(stride % value.itemsize == 0 for stride in value.strides)
    return value if whole else value.copy()


def tokens(tokens: Array, shape: str = "(B, N, D)") -> Array:
    """Tokens of a dtype that the ops take."""
    is_array(tokens, "tokens")
    if tokens.dtype.name not in ("float32", "bfloat16", "float16") or not tokens.dtype.isnative:
        raise TypeError(f"tokens: expected float32, bfloat16 or float16, got {tokens.dtype.name}")
    if tokens.ndim != shape.count(",") + 1 or tokens.shape[-1] < 1:
        raise ValueError(f"tokens: expected shape {shape} with D >= 1, got {tokens.shape}")
    return array(tokens, "tokens", tokens.dtype)


def query(query: Array, query_mask: Array | None, tokens: Array, batch: int, width: int) -> tuple[Array, Array | None]:
    """The query and its mask, fit to be compared with `batch` images of tokens of `width` in its space."""
    query = array(query, "query", tokens.dtype)
    if query.ndim != 3 or query.shape[0] not in (batch, 1) or query.shape[1] < 1 or query.shape[2] != width:
        raise ValueError(f"query: expected shape ({batch} or 1, Q >= 1, {width}), got {query.shape}")
    if query_mask is not None:
        query_mask = array(query_mask, "query_mask", np.bool_)
        if query_mask.ndim != 2 or query_mask.shape[0] not in (batch, 1) or query_mask.shape[1] != query.shape[1]:
            raise ValueError(f"query_mask: expected shape ({batch} or 1, {query.shape[1]}), got {query_mask.shape}")
    return query, query_mask


def words(array: Array) -> Array:
    """bfloat16 is no type of NumPy's own and travels as its 16 bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def whole(value: Any) -> Any:
    """An integer of NumPy's as Python's own, anything else as it is: the checks speak of that."""
    return int(value) if isinstance(value, np.integer) else value


def real(value: Any) -> Any:
    """A number of NumPy's as Python's own, anything else as it is."""
    return float(value) if isinstance(value, np.floating) else whole(value)


def relevance(relevance: Array, tokens: Array, name: str = "relevance") -> Array:
    """A relevance for each of the tokens."""
    relevance = array(relevance, name, np.float32)
    if relevance.shape != tokens.shape[:2]:
        raise ValueError(f"{name}: expected shape {tokens.shape[:2]}, got {relevance.shape}")
    return relevance


def count(count: int, argument: str, limit: int, limit_name: str) -> int:
    """How many of at most `limit`."""
    count = whole(count)
    check_int(count, argument)
    if not 1 <= count <= limit:
        raise ValueError(f"{argument}: expected 1 <= {argument} <= {limit_name} = {limit}, got {count}")
    return count


def threads(threads: int) -> int:
    """How many threads a call may use."""
    threads = whole(threads)
    check_int(threads, "threads")
    if threads < 1:
        raise ValueError(f"threads: expected threads >= 1, got {threads}")
    return threads


def prune_options(**given: Any) -> PruneOptions:
    """The options of prune, checked."""
    negate = bool(given.pop("negate"))
    counts = {name: whole(given.pop(name)) for name in ("min_degree", "rounds")}
    options = PruneOptions(negate=negate, **counts, **{name: real(value) for name, value in given.items()})
    options.check()
    return options


def values(options: PruneOptions) -> tuple[bool, float, float, str, float, float, int, int, float, float, str]:
    """The options as _core takes them."""
    return (
        options.negate,
        float(options.gsp_drop),
        float(options.oversample),
        options.combine,
        float(options.threshold),
        float(options.gamma),
        options.min_degree,
        options.rounds,
        float(options.floor),
        float(options.power),
        options.reduce,
    )
