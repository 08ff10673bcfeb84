"""Chooses the rows of one encoder step, and carries their places in the image through bf16 without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate

import torch
from torch import Tensor

from .. import methods, prune_varlen
from ..options import Grids
from .settings import Order, Rule

POSITION_CHANNELS = 3  # t, h, w


def newline_rows(order: Order, base: int) -> Tensor:
    """(before,) bool: the newline rows of an any-resolution image: one ends each line after the `base` view's rows."""
    mask = torch.zeros(order.before, dtype=torch.bool)
    if order.newlines:
        rows = order.before - base
        if rows <= 0 or rows % order.newlines:
            raise RuntimeError(f"image rows: expected {order.newlines} lines after {base} rows, got {rows} rows")
        width = rows // order.newlines
        mask[base + width - 1 :: width] = True
    return mask


def unit_mean(vectors: Tensor) -> Tensor:
    """(Q, C) -> (1, C): the mean of the unit vectors.

    The mean cosine to Q vectors is the product with this one, and the scaling of `query_relevance` takes its length
    off, so that questions of any number of words fit one call.
    """
    wide = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return wide.mean(0, keepdim=True).to(vectors.dtype)


def choose(
    features: Sequence[Tensor],
    orders: Sequence[Order],
    queries: Sequence[Tensor | None],
    width: int,
    base: int = 0,
    grids: Sequence[Grids | None] | None = None,
) -> list[Tensor | None]:
    """The rows that stay of each image, ascending int64, or None where all do.

    features: (before, >= width) each; the first `width` channels are compared. queries: (Q, width) each or None. grids:
    in which an image's rows lie line by line, without those of newlines, for methods that ask; None: unknown. Images
    with the op's own rule, the same options and alike a query or none are chosen in one call of `prune_varlen`, all of
    them where nothing was set per request. Other methods choose image by image, so that what else a step holds changes
    nothing.

    Raises RuntimeError if the encoder gave another number of rows than the prompt was made for: vLLM would go on and
    use the first ones.
    """
    groups: dict[tuple[Rule, bool], list[int]] = {}
    for i, (rows, order) in enumerate(zip(features, orders, strict=True)):
        if order.after == 0:
            continue
        if len(rows) != order.before:
            raise RuntimeError(f"image rows: expected {order.before}, as the prompt was made for, got {len(rows)}")
        if order.after != order.before:
            groups.setdefault((order.rule, queries[i] is None), []).append(i)
    chosen: list[Tensor | None] = [None] * len(features)
    for (rule, unasked), members in groups.items():
        device = features[members[0]].device
        candidates = {i: (~newline_rows(orders[i], base)).nonzero()[:, 0].to(device) for i in members}
        packed = [features[i][:, :width].index_select(0, candidates[i]) for i in members]
        keep = [orders[i].after for i in members]
        words = [None if unasked else _present(queries[i]) for i in members]
        options = rule.fused
        if options is None:
            lie = [None if grids is None else grids[i] for i in members]
            kept = [_by_method(*one, rule) for one in zip(packed, words, keep, lie, strict=True)]
        else:
            starts = [0, *accumulate(len(rows) for rows in packed)]
            ends = torch.tensor(starts, dtype=torch.int32, device=device)
            query = None if unasked else torch.stack([unit_mean(_present(own)) for own in words])
            flat = prune_varlen(torch.cat(packed), ends, query, keep, **asdict(options))
            kept = [own - start for own, start in zip(flat.split(keep), starts, strict=False)]
        for i, own in zip(members, kept, strict=True):
            chosen[i] = candidates[i][own]
    return chosen


def _by_method(rows: Tensor, words: Tensor | None, keep: int, grids: Grids | None, rule: Rule) -> Tensor:
    """rows (N, C), words (Q, C) or None -> (keep,) int64, ascending."""
    options = dict(rule.options)
    negate = options.pop("negate")  # the sign is the relevance's
    relevance = None
    if words is not None:
        relevance = methods.relevance_of(rows[None], words[None], reduce=rule.reduce, negate=negate)
        if grids is not None and methods.facts_of(rule.method):  # without a grid nothing is chosen by the other
            above = methods.relevance_of(rows[None], words[None], reduce="above", negate=negate)
            options |= {"above": above, "grids": grids}
    return methods.select(rows[None], relevance, keep, method=rule.method, **options)[0]


def _present(query: Tensor | None) -> Tensor:
    assert query is not None
    return query


def _integers(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def attach_positions(rows: Tensor, positions: Tensor) -> Tensor:
    """rows (k, C), positions (k, 3) integers -> (k, C + 3): their bits, in channels of the rows' dtype."""
    integers = _integers(rows.dtype)
    limit = torch.iinfo(integers).max
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) > limit):
        raise RuntimeError(
            f"positions: expected 0 to {limit}, to be carried in {rows.dtype}, got {int(positions.max())}"
        )
    return torch.cat([rows, positions.to(rows.device, integers).view(rows.dtype)], dim=1)


def detach_positions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(k, C + 3) -> rows (k, C), positions (k, 3) int64."""
    bits = rows[:, -POSITION_CHANNELS:].contiguous().view(_integers(rows.dtype))
    return rows[:, :-POSITION_CHANNELS], bits.long()


def grid_positions(grid: tuple[int, int, int]) -> Tensor:
    """(t * h * w, 3) int64: the (t, h, w) of each row of an image, in the encoder's order."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, POSITION_CHANNELS)
