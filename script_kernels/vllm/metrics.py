"""Visual tokens before and after, and the time of a selection: in vLLM's log, and as Prometheus metrics beside its own.

Tokens are counted where prompts are processed, beside the server. A selection runs in the engine's process, whose
numbers a server's /metrics shows if both were started with PROMETHEUS_MULTIPROC_DIR naming an empty folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace

from . import engine
from .settings import Order

logger = engine.init_logger("vllm.script_kernels")


@cache
def collectors() -> SimpleNamespace:
    from prometheus_client import Counter, Histogram

    buckets = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    return SimpleNamespace(
        before=Counter("script_kernels_visual_tokens_before", "Visual tokens of the images that were to be pruned"),
        after=Counter("script_kernels_visual_tokens_after", "Visual tokens that stayed of these"),
        seconds=Histogram(
            "script_kernels_selection_seconds", "Time of the selection of an encoder step", buckets=buckets
        ),
    )


def totals(orders: Iterable[Order | None]) -> tuple[int, int, int]:
    """Images that are pruned, their visual tokens before, and after."""
    own = [order for order in orders if order is not None and order.after]
    return len(own), sum(order.before for order in own), sum(order.after for order in own)


def count_request(orders: list[Order | None]) -> None:
    """One prompt, as its processor leaves it."""
    images, before, after = totals(orders)
    if images:
        collectors().before.inc(before)
        collectors().after.inc(after)
        logger.info("script-kernels: request: %d -> %d visual tokens in %d images", before, after, images)


def count_step(orders: list[Order], seconds: float) -> None:
    """One encoder step. On a GPU the time is the host's: the device goes on by itself."""
    images, before, after = totals(orders)
    if images:
        collectors().seconds.observe(seconds)
        logger.info(
            "script-kernels: encoder step: %d -> %d visual tokens in %d images, %.2f ms",
            before, after, images, seconds * 1e3,
        )  # fmt: skip
