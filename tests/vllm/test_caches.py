"""What the caches of the real engine hold and hand out: the encoder's, the prefix's, and the processor's."""

from typing import Any

from conftest import CLOSE, distance


def test_without_a_query_one_encoder_run_serves_every_question(told: dict[str, Any]) -> None:
    first, second, repeated = told["unasked"]["turns"]
    assert first["encoded"] == 1
    assert second["encoded"] == repeated["encoded"] == 0
    assert first["identities"] == second["identities"] == repeated["identities"]
    assert len(first["identities"]) == 1
    # The block that ends within the image serves both questions.
    assert second["cached"][0]["cached"] >= 32


def test_with_a_query_no_question_gets_anothers_choice(told: dict[str, Any]) -> None:
    first, second, repeated = told["asked"]["turns"]
    assert first["encoded"] == second["encoded"] == 1
    assert first["chosen"] != second["chosen"]
    assert second["cached"][0]["cached"] == 0
    assert len(first["identities"]) == 1
    assert len(second["identities"]) == 2
    # The first question again: nothing new is encoded, nothing else chosen.
    assert repeated["encoded"] == 0
    assert repeated["identities"] == second["identities"]
    together = told["asked"]["together"]
    assert together["encoded"] == 2
    assert sorted(together["chosen"]) == sorted(first["chosen"] + second["chosen"])
    assert together["identities"] == second["identities"]


def test_identities_name_what_was_asked_for(told: dict[str, Any]) -> None:
    asked, unasked = told["asked"]["together"]["identities"], told["unasked"]["together"]["identities"]
    assert len(unasked) == 1
    assert all(name.startswith("script-ratio0.4-") for name in asked + unasked)
    assert not set(asked) & set(unasked)


def test_an_image_that_is_encoded_again_keeps_the_same_tokens(told: dict[str, Any]) -> None:
    alone, batch, again = told["reencoded"]
    assert (alone["encoded"], batch["encoded"], again["encoded"]) == (1, 4, 4)
    assert batch["chosen"] == again["chosen"]
    assert alone["chosen"][0] in batch["chosen"]
    assert distance(alone["answers"][0], batch["answers"][0]) < CLOSE
    for got, want in zip(again["answers"], batch["answers"], strict=True):
        assert distance(got, want) < CLOSE


def test_an_image_that_was_evicted_fits_the_blocks_that_were_computed_before(told: dict[str, Any]) -> None:
    first, mixed, fresh = told["straddled"]
    assert mixed["encoded"] == 1
    assert mixed["answers"][0]["cached"] >= 32
    assert first["chosen"] == mixed["chosen"] == fresh["chosen"]
    assert fresh["answers"][0]["cached"] == 0
    assert distance(mixed["answers"][0], fresh["answers"][0]) < CLOSE
