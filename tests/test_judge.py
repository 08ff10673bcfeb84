"""The judge: its pictures come out as committed, its questions are true, its weights answer, pruned and unpruned."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from bench.judge import bank, evaluate, fifth, fourth, loss, report, second, sixth, train
from bench.judge.model import Judge
from bench.judge.scenes import COLOUR_NAMES, GRID, KINDS, LETTERS, WORDS, Composer
from script_kernels import methods

BANK = "29e6f075c9b70bcf30ec08ab8327cec9d71229b07796bced28194c640db9ce9b"
SCENES = "a54a791fe14fb3c73b444ce4f64945b9fb608fd857addaef8385ea049c242ef7"
SEEDS = sorted(int(p.stem[4:]) for p in train.WEIGHTS.glob("seed*.safetensors"))


def scenes(split="val", count=12, seed=7):
    composer, rng = Composer(split), np.random.default_rng(seed)
    return [composer.scene(rng) for _ in range(count)]


def test_the_bank_is_the_committed_one():
    assert bank.digest(bank.load()) == BANK


def test_scenes_come_out_bit_for_bit():
    total = hashlib.sha256()
    for scene in scenes(count=5):
        total.update(scene.image.tobytes() + scene.things.tobytes() + str(scene.questions).encode())
    assert total.hexdigest() == SCENES


def test_answers_follow_from_the_labels():
    """Against the labels of the patches alone, which the tower's targets and the questions do not share a path to."""
    asked = set()
    for scene in scenes(count=40):
        things, colours = scene.things.reshape(GRID, GRID), scene.colours.reshape(GRID, GRID)
        for q in scene.questions:
            words = [WORDS[w] for w in q.words if w]
            answers = [WORDS[a] for a in q.answers if a]
            letters = [w for w in words if w in LETTERS]
            places = {w: np.argwhere(things == 1 + LETTERS.index(w)) for w in letters}
            asked.add(q.kind)
            if q.kind == "colour":
                assert {COLOUR_NAMES[colours[tuple(p)] - 1] for p in places[letters[0]]} == set(answers)
            elif q.kind == "exists":
                assert answers == ["yes" if len(places[letters[0]]) else "no"]
            elif q.kind == "count":
                assert (colours == 1 + COLOUR_NAMES.index(words[-1])).sum() == 16 * (
                    1 + ["one", "two", "three", "four"].index(answers[0])
                )
            elif q.kind in ("right", "left"):
                row, column = places[letters[0]].min(0)
                beside = things[row, column + (4 if q.kind == "right" else -4)]
                assert answers == [LETTERS[beside - 1]]
            elif q.kind == "where":
                row, column = places[letters[0]].mean(0) + 0.5
                assert answers == [("top" if row < 12 else "bottom") + ("left" if column < 12 else "right")]
            elif q.kind == "letter":
                on = things[colours == 1 + COLOUR_NAMES.index(words[-1])]
                assert {LETTERS[t - 1] for t in on} == set(answers)
            elif q.kind == "number":
                row, column = np.argwhere(things > len(LETTERS)).min(0)
                assert answers == [str(things[row, column + 4 * n] - 1 - len(LETTERS)) for n in range(2)]
            elif q.kind == "before":
                left, right = (places[w].min(0)[1] for w in (words[1], words[-1]))
                assert answers == ["yes" if left < right else "no"]
    assert asked == set(KINDS)


def test_splits_share_no_picture():
    stored = bank.load()
    for kind in ("letters", "digits", "photos"):
        parts = [stored[f"{kind}_{split}"] for split in bank.SPLITS]
        rows = [{p.tobytes() for p in part} for part in parts]
        assert not rows[0] & rows[1]
        assert not rows[2] & (rows[0] | rows[1])


def test_questions_in_one_sequence_answer_as_each_alone():
    torch.manual_seed(0)
    judge = Judge().eval()
    some = scenes(count=1)
    images, position = train.images_of(some)
    words, _ = train.questions_of(some)
    with torch.no_grad():
        tokens = judge.projector(judge.tower(images, position).features)
        together = judge(tokens, position, words)
        alone = judge(tokens, position, words[:, 3:4])
        changed = tokens.clone()
        changed[:, :300] = tokens[:, 276:]
        assert not torch.allclose(judge(changed, position, words), together, atol=1e-4)
    torch.testing.assert_close(together[:, 3], alone[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_judge_answers_as_recorded(seed):
    """The first scenes of the test split, again: other machines round bfloat16 otherwise, so a few answers may turn."""
    recorded = dict(np.load(evaluate.RESULTS / f"seed{seed}-test.npz"))
    assert recorded["unpruned"].mean() > 0.85
    assert recorded["other_image"].mean() < 0.40
    given = evaluate.exam(seed, "test", 16)
    n = len(given)
    some = [evaluate.Setting("random"), evaluate.Setting("dpp"), evaluate.Setting("relevance", source="evidence")]
    found = evaluate.evaluate(given, some, (576, 64), log=lambda line: None)
    assert (found["image"] == recorded["image"][:n]).all()
    assert (found["kind"] == recorded["kind"][:n]).all()
    assert (found["unpruned"] == recorded["unpruned"][:n]).mean() > 0.97
    assert (found["right"][:, 0] == found["unpruned"]).all()  # all tokens kept: the same answers
    assert (found["kl"][:, 0] < 1e-2).all()
    names, keeps = list(recorded["settings"]), list(recorded["keeps"])
    for right, setting in zip(found["right"][:, 1], some, strict=True):
        before = recorded["right"][names.index(setting.name), keeps.index(64), :n]
        assert (right == before).mean() > 0.95
    assert np.nanmin(found["evidence"][2, 1].astype(float)) == 1  # 64 tokens hold all evidence, at most 4 tiles


def test_three_judges_are_committed():
    assert SEEDS == [0, 1, 2]
    for seed in SEEDS:
        log = (train.WEIGHTS / f"seed{seed}.log").read_text()
        digest = hashlib.sha256((train.WEIGHTS / f"seed{seed}.safetensors").read_bytes()).hexdigest()
        assert log.rstrip().endswith(digest)


def test_a_difference_has_the_interval_of_its_clusters():
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(400), 8)
    covered = 0
    for _ in range(200):
        shift = np.repeat(rng.normal(size=400), 8)  # a scene's questions fall together
        a = rng.normal(size=3200) + shift
        mean, half = report.difference(a, np.zeros(3200), image)
        covered += abs(mean) <= half
    assert 180 <= covered <= 198
    assert half > 2 * 1.96 / np.sqrt(3200)  # questions taken for independent ones would give half of this


def test_the_second_test_split_is_other_scenes_of_the_test_s_pictures():
    first, other = (
        [composer.scene(rng).image.tobytes() for _ in range(20)]
        for composer, rng in (
            (Composer(evaluate.BANKS.get(split, split)), np.random.default_rng(evaluate.GENERATORS[split]))
            for split in ("test", "test2")
        )
    )
    assert not set(first) & set(other)
    assert evaluate.BANKS["test2"] == "test"
    for again in ("second", "third"):  # the validation split, not scenes that anything else was concluded from
        assert evaluate.BANKS[again] == "val"
        assert evaluate.GENERATORS[again] == evaluate.GENERATORS["val"]
    for run in report.read("third").values():
        assert list(run["settings"]) == [s.name for s in second.third()]


def test_the_second_round_is_recorded_and_leaves_the_default_by_its_rule():
    """Rules 7 to 9 of RULE.md from the raw answers, and what the integrations do is what follows from them."""
    names = [s.name for s in second.opened()]
    chosen, runs = second.candidate(), report.read("test2")
    assert list(runs) == SEEDS
    for run in runs.values():
        assert list(run["settings"]) == names
        assert list(run["keeps"]) == [128, 64, 32]
        assert run["unpruned"].mean() > 0.85
        assert run["other_image"].mean() < 0.40

    def share(name):
        return [r["right"][names.index(name), 1].mean() / r["unpruned"].mean() for r in runs.values()]

    assert not report.unbeaten(runs)[second.DEFAULT.name]
    taken = not report.unbeaten(runs)[chosen.name] and min(share(chosen.name)) >= 0.969
    _, options, reduce = methods.settled("script", {}, None, asked=True)
    kept = chosen if taken else second.DEFAULT
    assert (options, reduce) == (kept.options, kept.reduce)


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_the_second_round_s_settings_answer_as_recorded(seed):
    recorded = dict(np.load(evaluate.RESULTS / f"seed{seed}-second.npz"))
    given = evaluate.exam(seed, "second", 6)
    names = list(recorded["settings"])
    some = [s for s in second.second() if s.method in ("max_min", "raw") or "uniform" in s.options][::3]
    found = evaluate.evaluate(given, some, (64,), log=lambda line: None)
    for right, setting in zip(found["right"][:, 0], some, strict=True):
        before = recorded["right"][names.index(setting.name), 1, : len(given)]
        assert (right == before).mean() > 0.9


def test_a_word_that_is_near_to_everything_hides_no_other():
    torch.manual_seed(0)
    tokens = torch.randn(2, 40, 8) * 0.1
    tokens[:, :, 0] += 2.0  # what all tokens have in common, and the first word is
    tokens[:, 7, 3] += 2.0
    words = torch.zeros(2, 3, 8)
    words[:, 0, 0] = words[:, 1, 3] = 1.0
    words[:, 2, 0] = -1.0
    words[:, 2, 1] = 9.0  # not a word of the question
    known = torch.tensor([[True, True, False]] * 2)
    found = fourth.centred(tokens, words, known)
    assert found.argmax(1).tolist() == [7, 7]
    assert (found.amin(1) == 0).all()
    assert (found.amax(1) == 1).all()
    assert methods.relevance_of(tokens, words, known, reduce="max")[:, 7].max() < 0.5  # there the first one wins
    torch.testing.assert_close(fourth.centred(tokens, words[:, :2], known[:, :2]), found)
    assert (fourth.centred(tokens[:, :1].expand(-1, 40, -1), words, known) == 1).all()


def test_shares_are_of_surroundings_of_even_distances_and_of_the_rest():
    torch.manual_seed(0)
    relevance, tokens = torch.rand(2, GRID * GRID), torch.randn(2, GRID * GRID, 16)
    near, grid = fourth.surroundings(relevance, 2), relevance.view(2, GRID, GRID)
    for b, row, column in ((0, 0, 0), (1, 23, 5), (0, 11, 12)):
        square = grid[b, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        torch.testing.assert_close(near[b, row * GRID + column], square.mean())
    options = {"relevant": 0.5, "near": 2, **second.GRAPH}
    kept = fourth.shares(tokens, relevance, 64, **options)
    assert all(len(set(row)) == 64 for row in kept.tolist())
    for b in range(2):
        assert set(near[b].topk(32).indices.tolist()) == set(kept[b, :32].tolist())
        rest = [n for n in range(GRID * GRID) if n not in set(kept[b, :32].tolist())]
        own = methods.select(tokens[b : b + 1, rest], None, 32, method="script", **second.GRAPH)[0]
        assert [rest[n] for n in own.tolist()] == kept[b, 32:].tolist()
        evenly = fourth.shares(tokens, relevance, 64, even=0.125, **options)[b]
        assert evenly[:32].tolist() == kept[b, :32].tolist()
        stride = methods.select(tokens[b : b + 1, rest], None, 8, method="stride")[0]
        assert [rest[n] for n in stride.tolist()] == evenly[32:40].tolist()
        assert len(set(evenly.tolist())) == 64


def test_the_fourth_round_is_recorded_and_leaves_the_default_by_its_rule():
    """Rules 10 to 13 of RULE.md from the raw answers."""
    assert evaluate.BANKS["fourth"] == "val"
    assert evaluate.BANKS["test3"] == "test"
    assert len({evaluate.GENERATORS[split] for split in ("val", "fourth", "test", "test2", "test3")}) == 5
    names, chosen, runs = [s.name for s in fourth.opened()], fourth.candidate(), report.read("test3")
    assert list(runs) == SEEDS
    low, share = [], []
    for run in runs.values():
        assert list(run["settings"]) == names
        assert list(run["keeps"]) == [128, 64, 32]
        assert run["unpruned"].mean() > 0.85
        ours, present = run["right"][names.index(chosen.name)], run["right"][names.index(second.DEFAULT.name)]
        share.append(ours[1].mean() / run["unpruned"].mean())
        mean, half = report.difference(ours[2], present[2], run["image"], 1 - 0.05 / len(names))
        low.append(mean < -half)
    beaten = report.unbeaten(runs)[chosen.name]
    _, options, reduce = methods.settled("script", {}, None, asked=True)
    assert (options, reduce) == (second.DEFAULT.options, second.DEFAULT.reduce)
    assert beaten or min(share) < 0.969 or any(low)  # else the default would have to change


def test_the_fourth_round_s_settings_answer_as_recorded():
    recorded = dict(np.load(evaluate.RESULTS / "seed0-fourth.npz"))
    given = evaluate.exam(0, "fourth", 6)
    names = list(recorded["settings"])
    found = evaluate.evaluate(given, fourth.candidates(), (64,), log=lambda line: None)
    for right, setting in zip(found["right"][:, 0], fourth.candidates(), strict=True):
        before = recorded["right"][names.index(setting.name), 1, : len(given)]
        assert (right == before).mean() > 0.9


def test_a_relevance_is_spread_over_what_is_like_a_token():
    torch.manual_seed(0)
    kinds = torch.eye(8)[torch.arange(40) % 4]  # ten tokens of a kind, nowhere side by side
    tokens = (kinds + 0.01 * torch.randn(2, 40, 8)) * torch.rand(2, 40, 1).add(0.5)
    relevance = torch.zeros(2, 40)
    relevance[:, 1] = 1.0  # one token of the second kind
    found = fifth.spread(tokens, relevance)
    assert set((found > 0.5).nonzero()[:, 1].tolist()) == set(range(1, 40, 4))
    assert (found.amin(1) == 0).all()
    assert (found.amax(1) == 1).all()
    assert (fifth.spread(tokens, torch.ones(2, 40)) == 1).all()
    plain = tokens[:, torch.tensor([0, 4, 8, 12, 16, 1, 2, 3])]
    assert fifth.typical(plain, None, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_shares_by_relevance_follow_the_question_and_the_budget():
    alike = torch.zeros(5, 576)
    for row, above in zip(alike, (0, 16, 18, 64, 65), strict=True):
        row[:above] = 0.9
    assert fifth.wanted(alike, 64, 0.5, 0.625).tolist() == [32, 32, 36, 40, 16]  # the last points nowhere
    assert fifth.wanted(alike, 48, 0.5, 0.625).tolist() == [12, 15, 15, 6, 6]  # of halves
    assert fifth.wanted(alike, 128, 0.5, 0.625).tolist() == [64, 64, 64, 80, 80]
    assert fifth.wanted(alike, 32, 0.5, 0.625).tolist() == [0] * 5


def test_a_small_budget_is_the_default_s_and_a_larger_one_is_shared():
    torch.manual_seed(0)
    tokens = torch.randn(3, GRID * GRID, 16)
    relevance, beside = torch.rand(2, 3, GRID * GRID)
    options = {**second.GRAPH, "floor": 0.3}
    how = {"beside": beside, "least": 0.5, "most": 0.625, **options}
    for few in (8, 32):
        default = methods.select(tokens, relevance, few, **options)
        assert fifth.focused(tokens, relevance, few, **how).sort(1).values.tolist() == default.tolist()
    seen = fifth.spread(tokens, beside)
    near = fourth.surroundings(seen * seen, 2)
    for keep in (48, 64, 128):
        kept, counts = fifth.focused(tokens, relevance, keep, **how), fifth.wanted(seen, keep, 0.5, 0.625)
        for b, count in enumerate(counts.tolist()):
            assert len(set(kept[b].tolist())) == keep
            assert set(kept[b, :count].tolist()) == set(near[b].topk(count).indices.tolist())
            rest = [n for n in range(GRID * GRID) if n not in set(kept[b, :count].tolist())]
            few = int(keep / 8 * fifth.whole(keep, GRID * GRID))
            typical = fifth.typical(tokens[b : b + 1, rest], None, few)[0]
            assert [rest[n] for n in typical.tolist()] == kept[b, count : count + few].tolist()


def test_the_fifth_round_is_recorded_and_leaves_the_default_by_its_rule():
    """Rules 14 to 17 of RULE.md from the raw answers."""
    assert evaluate.BANKS["fifth"] == "val"
    assert evaluate.BANKS["test4"] == "test"
    splits = ("val", "fourth", "fifth", "test", "test2", "test3", "test4")
    assert len({evaluate.GENERATORS[split] for split in splits}) == len(splits)
    names, chosen, runs = [s.name for s in fifth.opened()], fifth.candidate(), report.read("test4")
    assert list(runs) == SEEDS
    low, share = [], []
    for run in runs.values():
        assert list(run["settings"]) == names
        assert list(run["keeps"]) == [128, 64, 32]
        assert run["unpruned"].mean() > 0.85
        ours, present = run["right"][names.index(chosen.name)], run["right"][names.index(second.DEFAULT.name)]
        assert (ours[2] == present[2]).all()  # up to 1/18 of the tokens it is the default
        share.append(ours[1].mean() / run["unpruned"].mean())
        mean, half = report.difference(ours[0], present[0], run["image"], 1 - 0.05 / len(names))
        low.append(mean < -half)
    beaten = report.unbeaten(runs)[chosen.name]
    _, options, reduce = methods.settled("script", {}, None, asked=True)
    assert (options, reduce) == (second.DEFAULT.options, second.DEFAULT.reduce)
    assert beaten or min(share) < 0.969 or any(low)  # else the default would be free to change


def test_focus_keeps_the_mark_on_the_split_that_was_declared_for_it():
    """Rule 18 of RULE.md from the raw answers: in every seed, and above cdpruner, divprune and random."""
    runs, names = report.read("test5"), [s.name for s in fifth.confirmed()]
    assert list(runs) == SEEDS
    ours = next(n for n, name in enumerate(names) if name.startswith("focus"))
    for run in runs.values():
        assert list(run["settings"]) == names
        share = run["right"][:, list(run["keeps"]).index(64)].mean(1) / run["unpruned"].mean()
        assert share[ours] >= 0.969
        for other in ("cdpruner (pair)", "divprune", "random"):
            assert share[ours] > share[names.index(other)]


def test_the_fifth_round_s_settings_answer_as_recorded():
    recorded = dict(np.load(evaluate.RESULTS / "seed0-fifth.npz"))
    given = evaluate.exam(0, "fifth", 6)
    names = list(recorded["settings"])
    some = fifth.candidates()[::2]
    found = evaluate.evaluate(given, some, (64,), log=lambda line: None)
    for right, setting in zip(found["right"][:, 0], some, strict=True):
        before = recorded["right"][names.index(setting.name), 1, : len(given)]
        assert (right == before).mean() > 0.9


def right_of(run, setting, keep):
    return run["right"][list(run["settings"]).index(setting.name), list(run["keeps"]).index(keep)]


def not_below(runs, ours, other, keep):
    """In no seed below the other setting beyond the joint interval."""
    for run in runs.values():
        level = 1 - 0.05 / len(run["settings"])
        mean, half = report.difference(right_of(run, ours, keep), right_of(run, other, keep), run["image"], level)
        if mean < -half:
            return False
    return True


def test_the_default_is_what_the_sixth_round_s_rules_leave():
    """Rules 19 to 23 of RULE.md from the raw answers."""
    assert [evaluate.BANKS[split] for split in ("sixth", "test6", "test7")] == ["val", "test", "test"]
    own = {split: g for split, g in evaluate.GENERATORS.items() if split not in ("second", "third")}  # val once more
    assert len(set(own.values())) == len(own)
    by_chance, ours_by_chance = sixth.wrong()[0], sixth.wrong()[2]
    stands = {}
    for split, opened in (("test6", sixth.opened()), ("test7", sixth.again())):
        runs = report.read(split)
        assert list(runs) == SEEDS
        for run in runs.values():
            assert list(run["settings"])[: len(opened)] == [s.name for s in opened]
            assert list(run["keeps"]) == [128, 64, 32]
            assert len(set(run["image"])) == 480
            assert (right_of(run, sixth.FOCUS, 32) == right_of(run, second.DEFAULT, 32)).all()
        stands[split] = (
            not report.unbeaten(runs)[sixth.FOCUS.name]
            and all(not_below(runs, sixth.FOCUS, second.DEFAULT, keep) for keep in (128, 32))
            and all(not_below(runs, ours_by_chance, by_chance, keep) for keep in (128, 64, 32))
        )
        for run in runs.values():
            for other in ("cdpruner (pair)", "divprune", "dpp", "random"):
                theirs = run["right"][list(run["settings"]).index(other), 1]
                assert right_of(run, sixth.FOCUS, 64).mean() > theirs.mean()
    runs = report.read("test6")
    kept = [right_of(run, sixth.FOCUS, 64).mean() / run["unpruned"].mean() for run in runs.values()]
    assert stands["test6"]
    assert min(kept) < 0.969  # rule 21 leaves the default, rule 23 asks another split
    assert stands["test7"]
    assert methods.settled(None, {}, None, asked=True) == (sixth.FOCUS.method, {}, sixth.FOCUS.reduce)
    assert methods.settled("script", {}, None, asked=True)[1:] == (second.DEFAULT.options, second.DEFAULT.reduce)


def test_calibration_without_answers_is_within_a_point_of_the_best_setting():
    for run in report.read("test6").values():
        assert str(run["settings"][-1]).startswith("calibrated")
        fixed = [n for n, name in enumerate(run["settings"][:-1]) if "evidence" not in name]
        assert run["right"][-1, 1].mean() > max(run["right"][n, 1].mean() for n in fixed) - 0.01


def test_the_sixth_round_s_settings_answer_as_recorded():
    recorded = dict(np.load(evaluate.RESULTS / "seed0-sixth.npz"))
    given = evaluate.exam(0, "sixth", 6)
    names, some = list(recorded["settings"]), [sixth.FOCUS, sixth.wrong()[2]]
    found = evaluate.evaluate(given, some, (64,), log=lambda line: None)
    for right, setting in zip(found["right"][:, 0], some, strict=True):
        before = recorded["right"][names.index(setting.name), 1, : len(given)]
        assert (right == before).mean() > 0.9


def test_what_is_put_back_is_answered_from():
    given = evaluate.exam(0, "val", 4)
    everything = torch.ones(len(given), evaluate.TOKENS, dtype=torch.bool)
    assert (loss.answer(given, everything) == given.right(given.answer(None)[0])).all()
    few = torch.zeros_like(everything)
    few[:, :30] = True
    few[::2] = given.evidence[::2] | few[::2]  # counts differ
    alone = [loss.answer(_part(given, n), few[n : n + 1])[0] for n in range(8)]
    assert loss.answer(given, few)[:8].tolist() == [bool(a) for a in alone]


def _part(given, n):
    some = {name: getattr(given, name)[n : n + 1] for name in ("image", "words", "answers", "evidence")}
    return dataclasses.replace(given, kind=given.kind[n : n + 1], **some)
