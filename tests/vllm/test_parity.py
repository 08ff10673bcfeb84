"""The plugin in the real engine against transformers with `prune_inputs` on the same weights: one engine a family."""

from typing import Any

from conftest import CLOSE, distance
from scenarios import CHUNKS, METHODS, SIZES


def test_the_answers_are_those_of_transformers(told: dict[str, Any]) -> None:
    for run in ("first", "again", "alone"):
        for i, (got, want) in enumerate(zip(told[run], told["want"], strict=True)):
            assert got["length"] == want["length"], (run, i)
            assert distance(got, want) < CLOSE, (run, i)


def test_a_request_that_keeps_all_gets_the_whole_prompts_answer(told: dict[str, Any]) -> None:
    for i, (got, want) in enumerate(zip(told["all"], told["whole"], strict=True)):
        assert got["length"] == want["length"], i
        assert distance(got, want) < CLOSE, i


def test_another_selection_and_the_whole_image_are_told_apart(told: dict[str, Any]) -> None:
    for other in ("wrong", "whole"):
        for i, sizes in enumerate(SIZES):
            assert not sizes or distance(told["first"][i], told[other][i]) > 1e-2, (other, i)


def test_chunks_that_end_within_an_image_change_nothing(told: dict[str, Any]) -> None:
    for tokens in CHUNKS:
        chunked = told[f"chunk{tokens}"]
        assert max(chunked["steps"]) <= len(SIZES) * tokens
        for i, (got, want) in enumerate(zip(chunked["answers"], told["want"], strict=True)):
            assert distance(got, want) < CLOSE, (tokens, i)


def test_images_and_words_alone_share_a_step(told: dict[str, Any]) -> None:
    run = told["reencoded"][1]
    assert run["steps"][0] == sum(answer["length"] for answer in run["answers"])
    assert run["encoded"] == sum(len(sizes) for sizes in SIZES)


def test_every_method_answers_as_transformers_does(told: dict[str, Any]) -> None:
    runs = told["methods"]
    for name, run in runs.items():
        for got, want in zip(run["answers"], run["want"], strict=True):
            assert got["length"] == want["length"], name
            assert distance(got, want) < CLOSE, name
        asked = METHODS[name]["query"] == "text"
        assert len(run["identities"]) == run["encoded"] == (2 if asked else 1), name
    identities = [identity for run in runs.values() for identity in run["identities"]]
    assert len(set(identities)) == len(identities)
    first = [run["answers"][0] for run in runs.values()] + [told["unasked"]["turns"][0]["answers"][0]]
    for i, one in enumerate(first):
        assert all(distance(one, other) > 1e-2 for other in first[:i]), i


def test_the_answers_to_a_question_are_those_of_transformers(told: dict[str, Any]) -> None:
    for name in ("unasked", "asked"):
        first, second, repeated = told[name]["turns"]
        answers = [first["answers"][0], second["answers"][0]]
        for got, want in zip(answers, told[f"want_{name}"], strict=True):
            assert distance(got, want) < CLOSE, name
        for run in (told[name]["together"]["answers"], [repeated["answers"][0], second["cached"][0]]):
            assert all(distance(got, want) < CLOSE for got, want in zip(run, answers, strict=True)), name


def test_tokens_lie_in_the_grids_that_transformers_knows(told: dict[str, Any]) -> None:
    want = [shapes for answer in told["want_focus"] for shapes in answer["shapes"]]
    assert all(want)
    assert len(want) == sum(map(len, SIZES))
    assert sorted(told["focus"]["shapes"]) == sorted(want)
    for got, wanted in zip(told["focus"]["answers"], told["want_focus"], strict=True):
        assert got["length"] == wanted["length"]
        assert distance(got, wanted) < CLOSE
