"""The vLLM plugin's configuration: read, checked, and turned into numbers of tokens and cache identities."""

import itertools
import math

import pytest

from script_kernels.options import PruneOptions
from script_kernels.vllm.settings import NAMES, OPTIONS, Order, Settings, from_environment, without_settings

RATIO = Settings(keep_ratio=0.25)


def test_off_until_a_budget_is_given() -> None:
    assert not Settings().on
    assert not from_environment({}).on
    assert not from_environment({"SCRIPT_QUERY": "text", "PATH": "/bin"}).on
    assert Settings().kept(576) == Settings().placeholders(576) == 576


def test_the_environment_is_read() -> None:
    read = from_environment({"SCRIPT_KEEP": "64", "SCRIPT_QUERY": "text", "SCRIPT_GSP_DROP": "0.25"})
    assert read == Settings(keep=64, query="text", options=PruneOptions(gsp_drop=0.25))
    assert from_environment({"SCRIPT_KEEP_RATIO": "0.11"}) == Settings(keep_ratio=0.11)


def test_a_budget_replaces_the_other_and_the_rest_stays() -> None:
    engine = Settings(keep=64, query="text", options=PruneOptions(gsp_drop=0.25))
    assert engine.updated({"script_keep_ratio": 0.5}) == Settings(
        keep_ratio=0.5, query="text", options=PruneOptions(gsp_drop=0.25)
    )
    assert engine.updated({"max_pixels": 100}) is engine
    for none in (None, "", "none"):
        assert engine.updated({"script_query": none}).query is None


def test_other_processor_keywords_are_left() -> None:
    assert without_settings({"script_keep": 3, "max_pixels": 7, "script_oops": 1}) == {"max_pixels": 7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, r"script_keep: expected an int >= 1, got 0"),
        ({"keep": True}, r"script_keep: expected an int >= 1, got True"),
        ({"keep": 2.5}, r"script_keep: expected an int >= 1, got 2.5"),
        ({"keep": "many"}, r"script_keep: expected an int >= 1, got 'many'"),
        ({"keep_ratio": 0}, r"script_keep_ratio: expected a number in \(0, 1\], got 0"),
        ({"keep_ratio": math.nan}, r"script_keep_ratio: expected a number in \(0, 1\], got nan"),
        ({"keep_ratio": 1.01}, r"script_keep_ratio: expected a number in \(0, 1\], got 1.01"),
        ({"keep": 3, "keep_ratio": 0.5}, r"script_keep: expected either script_keep or script_keep_ratio, got 3"),
        ({"keep": 3, "query": "image"}, r"script_query: expected 'text' or None, got 'image'"),
        ({"keep": 3, "gsp_drop": 1.5}, r"script_gsp_drop: expected"),
        ({"keep": 3, "rounds": "two"}, r"script_rounds: expected"),
        (
            {"kept": 3},
            r"script_kept: expected one of script_keep, script_keep_ratio, script_query, .*, got script_kept",
        ),
    ],
)
def test_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings().updated({f"script_{name}": value for name, value in given.items()})


@pytest.mark.parametrize("tokens", [1, 2, 10, 64, 576, 2880])
def test_how_many_stay(tokens: int) -> None:
    for percent in range(1, 101):
        # Exact: the share of a whole number of tokens is no more than that, whatever binary fractions make of it.
        assert Settings(keep_ratio=percent / 100).kept(tokens) == max(1, -(-percent * tokens // 100))
    for keep in (1, 5, 10**6):
        assert Settings(keep=keep).kept(tokens) == min(keep, tokens)


def test_newline_rows_go_with_the_first_token() -> None:
    assert Settings(keep_ratio=1).placeholders(48, 4) == 48
    assert Settings(keep=44).placeholders(48, 4) == 48
    assert Settings(keep=43).placeholders(48, 4) == 43
    assert Settings(keep_ratio=0.5).placeholders(48, 4) == 22


def test_identities_are_equal_exactly_for_what_chooses_equally() -> None:
    settings = [
        Settings(keep=4), Settings(keep=5), RATIO, Settings(keep_ratio=0.5), Settings(keep=4, query="text"),
        Settings(keep=4, options=PruneOptions(gsp_drop=0.125)), Settings(keep=4, options=PruneOptions(negate=True)),
    ]  # fmt: skip
    queries: list[tuple[int, ...]] = [(), (1,), (1, 2), (2, 1), (12,)]
    names = [one.identity(query) for one, query in itertools.product(settings, queries)]
    assert len(set(names)) == len(names)
    assert Settings(keep=4).identity((1, 2)) == Settings(keep=4).identity((1, 2))
    assert RATIO.identity().startswith("script-ratio0.25-")
    assert Settings(keep=7).identity().startswith("script-keep7-")


@pytest.mark.parametrize(
    "options",
    [PruneOptions(), PruneOptions(negate=not PruneOptions().negate, gsp_drop=0.1, threshold=0.3, min_degree=2)],
)
def test_an_order_survives_its_row_of_numbers(options: PruneOptions) -> None:
    order = Order(before=2880, after=317, newlines=48, options=options)
    assert Order.unpack(order.pack()) == order
    assert len(order.pack()) == 3 + len(OPTIONS)
    assert set(OPTIONS) < set(NAMES)
