"""The vLLM plugin's configuration: read, checked, and turned into numbers of tokens and cache identities."""

import itertools
import math

import pytest

from script_kernels import methods
from script_kernels.vllm.plugin import too_old
from script_kernels.vllm.settings import Order, Settings, from_environment, without_settings

RATIO = Settings(keep_ratio=0.25)


def test_off_until_a_budget_is_given() -> None:
    assert not Settings().on
    assert not from_environment({}).on
    assert not from_environment({"SCRIPT_QUERY": "text", "PATH": "/bin"}).on
    assert Settings().kept(576) == Settings().placeholders(576) == 576


def test_the_environment_is_read() -> None:
    read = from_environment({"SCRIPT_KEEP": "64", "SCRIPT_QUERY": "text", "SCRIPT_GSP_DROP": "0.25"})
    assert read == Settings(keep=64, query="text", options={"gsp_drop": 0.25})
    assert from_environment({"SCRIPT_KEEP_RATIO": "0.11"}) == Settings(keep_ratio=0.11)


def test_a_budget_replaces_the_other_and_the_rest_stays() -> None:
    engine = Settings(keep=64, query="text", options={"gsp_drop": 0.25})
    assert engine.updated({"script_keep_ratio": 0.5}) == Settings(
        keep_ratio=0.5, query="text", options={"gsp_drop": 0.25}
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
        ({"keep": 3, "negate": "yes"}, r"script_negate: expected a bool, got 'yes'"),
        ({"keep": 3, "method": "best"}, r"script_method: expected one of script, focus, .*, got 'best'"),
        ({"keep": 3, "method": ["dpp"]}, r"script_method: expected one of script, focus, .*, got \['dpp'\]"),
        ({"keep": 3, "reduce": "sum"}, r"script_reduce: expected 'mean', 'max' or 'above', got 'sum'"),
        ({"keep": 3, "method": "cdpruner", "power": -1}, r"script_power: expected 0 <= power <= 64, got -1"),
        ({"keep": 3, "power": True}, r"script_power: expected a float, got bool"),
        ({"keep": 3, "mix": "half"}, r"script_mix: expected a float, got str"),
        ({"keep": 3, "method": "mmr", "balance": 2}, r"script_balance: expected 0 <= balance <= 1, got 2"),
        ({"keep": 3, "method": "random", "seed": 0.5}, r"script_seed: expected an int, got float"),
        ({"keep": 3, "method": "random", "seed": 2**70}, r"script_seed: expected seed < 2\*\*63, got"),
        ({"keep": 3, "method": "gsp", "rounds": 0}, r"script_rounds: expected rounds >= 1, got 0"),
        ({"keep": 3, "seed": 1}, r"script_seed: expected one of .*script_rounds, .*script_near, got script_seed"),
        (
            {"keep": 3, "seed": 1, "method": "script"},
            r"script_seed: expected one of .* with script_method=script, got script_seed",
        ),
        ({"keep": 3, "mix": 0.5, "near": 1}, r"options: expected those of 'focus' or of 'script' alone, got mix, near"),
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
        Settings(keep=4, options={"gsp_drop": 0.125}), Settings(keep=4, options={"negate": True}),
    ]  # fmt: skip
    queries: list[tuple[int, ...]] = [(), (1,), (1, 2), (2, 1), (12,)]
    names = [one.identity(query) for one, query in itertools.product(settings, queries)]
    assert len(set(names)) == len(names)
    assert Settings(keep=4).identity((1, 2)) == Settings(keep=4).identity((1, 2))
    assert RATIO.identity().startswith("script-ratio0.25-")
    assert Settings(keep=7).identity().startswith("script-keep7-")


@pytest.mark.parametrize("method", methods.METHODS)
def test_an_order_survives_its_row_of_numbers(method: str) -> None:
    options = {"negate": True} | ({"power": 0.1 + 0.2, "mix": 1 / 3} if method == "cdpruner" else {})
    rule = Settings(keep=3, query="text", method=method, reduce="max", options=options).rule
    order = Order(before=2880, after=317, newlines=48, rule=rule)
    row = order.pack()
    assert all(isinstance(value, int) for value in row)
    assert Order.unpack(row) == order
    assert Order.unpack(row).rule.options == rule.options
    assert dict(rule.options).keys() <= methods.options_of(method).keys()


def test_every_method_is_read_and_named_in_the_cache_identity() -> None:
    asked = {}
    for method in methods.METHODS:
        settings = from_environment({"SCRIPT_KEEP": "4", "SCRIPT_METHOD": method})
        assert settings == Settings(keep=4, method=method)
        assert settings.placeholders(100) == 4
        asked[method] = settings.identity()
    assert len(set(asked.values())) == len(methods.METHODS)
    assert asked["divprune"].startswith("script-keep4-divprune-")
    assert asked["script"].startswith("script-keep4-")


def test_the_environment_s_options_are_those_of_its_method() -> None:
    given = {"SCRIPT_KEEP": "4", "SCRIPT_SEED": "7", "SCRIPT_POWER": "2", "SCRIPT_NAME": "/cgi-bin/x"}
    assert from_environment(given) == Settings(keep=4, options={"power": 2})
    assert from_environment({**given, "SCRIPT_METHOD": "random"}) == Settings(
        keep=4, method="random", options={"seed": 7}
    )


def test_knobs_that_stand_where_the_op_has_them_are_the_op() -> None:
    plain = Settings(keep=4, query="text", reduce="mean", options={"floor": 0.6, "gsp_drop": 0.25})
    given = {"power": 1, "mix": 1.0, "floor": 0.6, "ridge": 0.0, "gsp_drop": 0.25}
    still = Settings(keep=4, query="text", reduce="mean", options=given)
    turned = Settings(keep=4, query="text", options={"power": 2})
    assert plain.rule.fused == still.rule.fused is not None
    assert plain.identity((1,)) == still.identity((1,))
    assert turned.rule.fused is None
    assert Settings(keep=4, query="text", reduce="max").rule.fused is None
    assert Settings(keep=4, reduce="max").rule.fused is not None, "without a question there is nothing to reduce"


def test_a_method_that_looks_at_no_relevance_is_spared_the_question() -> None:
    for method in methods.METHODS:
        settings = Settings(keep=4, query="text", method=method)
        assert settings.asks == (method in methods.NEEDS_RELEVANCE)
        free = Settings(keep=4, method=method)
        assert (settings.identity() == free.identity()) != settings.asks
    Settings(keep=4, method="relevance", query="text").check_complete()
    Settings(method="relevance").check_complete()
    with pytest.raises(ValueError, match=r"script_method: expected one that works without script_query=text, got 'rel"):
        Settings(keep=4, method="relevance").check_complete()


def test_a_request_takes_options_back() -> None:
    engine = Settings(keep=4, options={"gsp_drop": 0.125})
    with pytest.raises(ValueError, match=r"script_gsp_drop: expected one of .* with script_method=divprune, got"):
        engine.updated({"script_method": "divprune"})
    own = engine.updated({"script_method": "divprune", "script_gsp_drop": None})
    assert own == Settings(keep=4, method="divprune")
    assert own.updated({"script_method": "cdpruner", "script_mix": 0.5}) == Settings(
        keep=4, method="cdpruner", options={"mix": 0.5}
    )


def test_a_share_that_no_rounds_reach_is_refused_before_the_encoder() -> None:
    with pytest.raises(ValueError, match=r"script_gsp_drop: 0.9 keeps 58, which of N = 576 tokens cannot be reached"):
        Settings(keep=4, options={"gsp_drop": 0.9}).placeholders(576)
    restricted = Settings(keep=500, query="text", options={"combine": "restrict", "power": 2.0})
    with pytest.raises(ValueError, match=r"script_combine: expected 'intersect' for 500 of 576 tokens, got 'restrict'"):
        restricted.placeholders(576)
    assert Settings(keep=500, options={"combine": "restrict"}).placeholders(576) == 500  # the op fills up
    assert Settings(keep=500, query="text").placeholders(576) == 500  # leaves as many as it takes
    assert Settings(keep=500, options={"combine": "union", "gsp_drop": 0.9}).placeholders(576) == 500


def test_what_a_question_leaves_open_is_settled_as_in_transformers() -> None:
    asked = Settings(keep=4, query="text").rule
    assert (asked.method, asked.reduce) == ("focus", "max")
    assert {"floor": 0.3, "survivors": 2.0}.items() <= dict(asked.options).items()
    assert Settings(keep=4, query="text", method="focus").rule == asked
    script = Settings(keep=4, query="text", method="script").rule
    assert {"floor": 0.3, "combine": "restrict", "survivors": 2.0}.items() <= dict(script.options).items()
    free = Settings(keep=4).rule
    assert free.fused is not None
    assert (free.fused.floor, free.fused.combine, free.reduce) == (0, "intersect", "mean")
    own = Settings(keep=4, query="text", reduce="mean", options={"floor": 0.1, "gsp_drop": 0.5}).rule
    assert own.fused is not None
    assert (own.fused.floor, own.fused.gsp_drop, own.fused.combine) == (0.1, 0.5, "intersect")
    assert dict(Settings(keep=4, query="text", options={"mix": 0.5}).rule.options)["floor"] == 0


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("0.30.1", True),
        ("0.9.2", True),
        ("0.31.0", False),
        ("0.32.0+cpu", False),
        ("1.0.0", False),
        ("0.1.dev1+g12", False),
    ],
)
def test_an_engine_that_is_too_old(version: str, old: bool) -> None:
    assert too_old(version) == old


def test_a_checkered_split_is_checked_against_each_image():
    chosen = Settings(keep=9, options={"split": "checker", "grid_width": 6})
    assert chosen.placeholders(36) == 9
    with pytest.raises(ValueError, match="script_grid_width: expected a divisor of N = 40"):
        chosen.placeholders(40)
    for options in ({"split": "checker"}, {"split": "checker", "grid_width": 0}, {"grid_width": 6}):
        with pytest.raises(ValueError, match="script_grid_width: expected"):
            Settings(keep=9, options=options)
