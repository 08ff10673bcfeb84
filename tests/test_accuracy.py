"""bench.accuracy without lmms-eval, in whose place stand a registry, a command line and a class that loads a model."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
import shlex
import sys
from typing import Any

import pytest
import torch
from saved_vlm import photo, save_llava
from tiny_vlm import make_model, transformers

from bench.accuracy import lmms, rows
from script_kernels.calibrate import Calibration, Candidate, Row
from script_kernels.transformers import prune_inputs

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUESTION = "USER : <image> what is the car ? ASSISTANT :"
LMMS = {
    "__init__.py": "",
    "models/__init__.py": """
import importlib
from types import SimpleNamespace
class Registry:
    path = "lmms_eval.backend.LlavaHf"
    def resolve(self, name, force_simple):
        return SimpleNamespace(model_id=name, model_type="simple" if force_simple else "chat")
    def get_model_class(self, name, force_simple=False):
        module, _, kind = self.path.rpartition(".")
        return getattr(importlib.import_module(module), kind)
    def register_manifest(self, manifest, overwrite):
        self.path = manifest.chat_class_path
MODEL_REGISTRY_V2 = Registry()
""",
    "models/registry_v2.py": """
from types import SimpleNamespace
def ModelManifest(model_id, **paths):
    return SimpleNamespace(model_id=model_id, **paths)
""",
    "backend.py": """
import os, torch, transformers
from PIL import Image
class LlavaHf:
    def __init__(self, pretrained):
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(pretrained)
        self.model.generation_config.eos_token_id = None
        self._image_processor = transformers.AutoProcessor.from_pretrained(pretrained)
    def ask(self, text):
        inputs = self._image_processor(images=Image.open(os.environ["PHOTO"]), text=text, return_tensors="pt")
        try:
            new = int(os.environ.get("NEW", "6"))
            return inputs, self.model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=1)
        except Exception:
            return inputs, ""
""",
    "cli/__init__.py": "",
    "cli/dispatch.py": """
import json, os, pathlib, sys, threading, torch
from lmms_eval.models import MODEL_REGISTRY_V2
def main():
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    model = MODEL_REGISTRY_V2.get_model_class(given["--model"])(pretrained=given["--model_args"])
    if given["--tasks"] == "likelihood":
        return model.loglikelihood([])
    said = []
    asking = threading.Thread(target=lambda: said.append(model.ask(os.environ["QUESTION"])))  # as some backends do
    asking.start()
    asking.join()
    folder = pathlib.Path(given["--output_path"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(said[0], folder / "said.pt")
    results = {"exact_match,none": 0.5, "exact_match_stderr,none": "N/A", "alias": "t"}
    stored = {"results": {"t": results}, "n-samples": {"t": {"original": 9, "effective": 1}}}
    (folder / "now_results.json").write_text(json.dumps(stored))
""",
}


@pytest.fixture
def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name, text in LMMS.items():
        path = tmp_path / "packages" / "lmms_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(lmms, "PACKAGES", ("torch",))
    monkeypatch.setattr(sys, "argv", ["x"])
    photo(120, 90).save(tmp_path / "photo.png")
    monkeypatch.setenv("PHOTO", str(tmp_path / "photo.png"))
    monkeypatch.setenv("QUESTION", QUESTION)
    (tmp_path / "model").mkdir()
    save_llava(tmp_path / "model")
    return tmp_path


def one(folder: pathlib.Path, pruning: dict[str, Any], *more: str) -> tuple[int, dict[str, Any], Any]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        del sys.modules[name]
    run = folder / "run"
    run.mkdir(exist_ok=True)
    arguments = ["--model", "llava_hf", "--model_args", str(folder / "model"), "--tasks", "t", *more]
    code = lmms.main(["--folder", str(run), "--pruning", json.dumps(pruning), "--", *arguments])
    said = run / "lmms-eval" / "said.pt"
    return (
        code,
        json.loads((run / "run.json").read_text()),
        torch.load(said, weights_only=False) if said.exists() else None,
    )


def test_the_model_that_lmms_eval_loads_is_pruned(stand_in: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_model("llava"), transformers.AutoProcessor.from_pretrained(stand_in / "model")
    code, stored, (inputs, unpruned) = one(stand_in, {})
    assert (code, stored["void"]) == (0, [])
    common: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(unpruned, model.generate(**inputs, **common))
    length = inputs["input_ids"].shape[1]
    for pruning in (
        {"keep": 5},
        {"keep": 5, "method": "cdpruner", "power": 2.0},
        {"keep_ratio": 0.1, "method": "divprune"},
    ):
        code, stored, (inputs, pruned) = one(stand_in, pruning)
        assert (code, stored["void"], stored["scores"]) == (0, [], {"t": {"exact_match": 0.5}})
        kept = 5 if "keep" in pruning else 4
        seen = {"prompts": 1, "with_images": 1, "tokens_before": 36, "tokens_after": kept, "errors": []}
        assert stored["seen"] == seen
        expected = model.generate(**prune_inputs(model, inputs, tokenizer=processor, **pruning), **common)
        assert torch.equal(pruned[:, :length], inputs["input_ids"])
        assert torch.equal(pruned[:, length:], expected[:, -6:])
        assert not torch.equal(pruned, unpruned)

    code, stored, _ = one(stand_in, {"keep": 36})
    assert (code, stored["void"]) == (1, ["no token was dropped of 36"])
    monkeypatch.setenv("NEW", "0")
    code, stored, (_, said) = one(stand_in, {"keep": 5})
    assert (code, said) == (1, "")
    assert stored["void"][0].startswith("1 errors in generating, the first: ValueError: ")
    with pytest.raises(NotImplementedError, match="tasks that generate text"):
        one(stand_in, {"keep": 5}, "--tasks", "likelihood")


def test_pruning_that_was_lost_is_noticed(stand_in: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with images that nothing pruned, however that came about, voids the run."""
    monkeypatch.setattr(lmms.contextvars, "copy_context", lambda: lmms.contextvars.Context())
    code, stored, _ = one(stand_in, {"keep": 5})
    assert code == 1
    assert "expected pruning, as there are images, got none" in stored["void"][0]


def test_what_voids_a_run() -> None:
    good = lmms.Seen(prompts=4, with_images=4, tokens_before=100, tokens_after=20)
    scores, samples = {"t": {"exact_match": 0.0}}, {"t": 4}
    assert lmms.voids(good, True, scores, samples) == []
    assert lmms.voids(lmms.Seen(prompts=4), False, scores, samples) == []
    assert lmms.voids(lmms.Seen(prompts=4), True, scores, samples) == ["no prompt had an image"]
    assert lmms.voids(good, True, {}, {}) == ["lmms-eval left no score"]
    assert lmms.voids(good, True, {"t": {}}, samples) == ["lmms-eval left no score"]
    assert lmms.voids(good, True, scores, {"t": 5}) == ["5 answers of 4 prompts: some were not generated here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "t"], "--model"),
        (["--model", "m"], "--tasks"),
        (["--model", "m", "--tasks", "t", "--use_cache", "c"], "--use_cache: expected none, as answers kept"),
        (["--model", "m", "--tasks", "t", "--config=c.yaml"], "--config: expected none"),
        (["--model", "m", "--tasks", "t", "--predict_only"], "--predict_only: expected none"),
        (["--model", "m", "--tasks", "t", "--output_path", "c"], "--output_path: expected none"),
    ],
)
def test_arguments_that_would_make_it_another_run(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        lmms.check_arguments(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"keep": 5, "method": "none"}, "method: expected a callable or one of"),
        ({"keep": 5, "method": "cdpruner", "gsp_drop": 0.5}, "options: expected some of .*, got gsp_drop"),
        ({"keep": 5, "keep_ratio": 0.5}, "expected exactly one of the two"),
        ({"keep": "5"}, "keep: expected an int"),
        ({"keep": 5, "per": "row"}, "per: expected one of"),
        ({"keep": 5, "calibration": "missing.json"}, "missing.json"),
        ({"keep": 5, "calibration": "missing.json", "negate": True}, "expected no method, reduce or options with it"),
        ({"method": "script"}, "expected exactly one of the two"),
    ],
)
def test_pruning_is_checked_before_a_model_is_loaded(pruning: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        lmms.check_pruning(pruning)


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        lmms.check_arguments(["--model", "m", "--tasks", "t"])


SCORES = {"unpruned": 60.0, "script": 57.0, "random": 45.0, "calibrated": 58.2}


class Runs:
    """Takes the place of the process of a run: writes the run.json that it would leave."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.void: set[tuple[str, str]] = set()

    def __call__(self, command: list[str], stdout: Any, stderr: Any, env: dict[str, str]) -> None:
        assert command[1:4] == ["-m", "bench.accuracy", "one"]
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        self.commands.append(command)
        given = dict(zip(command[4:10:2], command[5:10:2], strict=True))
        rest = command[command.index("--") + 1 :]
        task, label = rest[rest.index("--tasks") + 1], given["--label"]
        why = ["it broke"] if (label, task) in self.void else []
        stored = {
            "label": label, "pruning": json.loads(given["--pruning"]), "arguments": rest, "void": why,
            "scores": {task: {"other": 1.0, rows.SCORES[task]: SCORES[label]}}, "samples": {task: 8}, "seconds": 1,
            "seen": {"tokens_before": 576, "tokens_after": 64}, "versions": {"torch": "2"}, "device": "d", "date": "",
        }  # fmt: skip
        (pathlib.Path(given["--folder"]) / "run.json").write_text(json.dumps(stored))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(rows.subprocess, "run", found)
    return found


def test_rows_are_run_once_and_make_one_table(
    runs: Runs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = Row(Candidate("divprune", query=False), 8, 0.1, 0.01, 0.9)
    Calibration(64, (best,)).save(tmp_path / "found.json")
    arguments = ["--preset", "llava-1.5-7b", "--keep", "64", "--method", "script", "--method", "random"]
    arguments += ["--tasks", "gqa,pope", "--out", str(tmp_path), "--calibration", str(tmp_path / "found.json")]
    runs.void = {("random", "gqa")}
    assert rows.main(arguments) == 1
    assert len(runs.commands) == 8
    assert "void: it broke" in capsys.readouterr().out
    out = tmp_path / "llava-1.5-7b"
    assert (out / "table.md").read_text().splitlines() == [
        "| method | keep | gqa exact_match | pope pope_f1_score | mean share |",
        "|---|---|---|---|---|",
        "| unpruned | all | 60 | 60 |  |",
        "| script | 64 | 57 (95.0%) | 57 (95.0%) | 95.0% |",
        "| random | 64 | void | 45 (75.0%) |  |",
        "| calibrated | 64 | 58.2 (97.0%) | 58.2 (97.0%) | 97.0% |",
    ]
    with (out / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7 * 2 + 1
    (broken,) = [line for line in lines if line["void"]]
    assert (broken["row"], broken["task"], broken["score"]) == ("random", "gqa", "")
    assert {line["share"] for line in lines if line["row"] == "script" and line["metric"] != "other"} == {"0.95"}

    runs.void, runs.commands = set(), []
    assert rows.main(arguments) == 0  # the one that was void, and no other
    assert [command[7] for command in runs.commands] == ["random"]
    runs.commands = []
    assert rows.main(arguments) == 0
    assert not runs.commands
    assert rows.main([*arguments, "--", "--limit", "8"]) == 0  # other settings are other runs, and take nothing away
    assert len(runs.commands) == 8
    Calibration(64, (Row(Candidate("dpp", query=False), 8, 0.1, 0.01, 0.9),)).save(tmp_path / "found.json")
    runs.commands = []
    assert rows.main([*arguments, "--only", "calibrated"]) == 0
    assert [command[7] for command in runs.commands] == ["calibrated"] * 2


def test_a_table_says_when_its_rows_are_of_several_machines(runs: Runs, tmp_path: pathlib.Path) -> None:
    arguments = [
        "--preset",
        "llava-1.5-7b",
        "--keep",
        "64",
        "--method",
        "script",
        "--tasks",
        "gqa",
        "--out",
        str(tmp_path),
    ]
    assert rows.main(arguments) == 0
    path = next(tmp_path.glob("*/script-*/run.json"))
    path.write_text(path.read_text().replace('"device": "d"', '"device": "e"'))
    assert rows.main(arguments) == 0
    assert 'More than one device: "d"; "e"' in (tmp_path / "llava-1.5-7b" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected exactly one of the two"),
        (["--model", "llava_hf"], "--keep: expected at least one with --model"),
        (["--preset", "llava-1.5-7b", "--method", "none"], "method: expected a callable or one of"),
        (["--preset", "llava-1.5-7b", "--method", 'script:{"power": 2}', "--keep", "many"], "many"),
        (["--preset", "llava-1.5-7b", "--keep", "64", "--keep", "64"], "expected each once"),
        (["--preset", "llava-1.5-7b", "--keep", "200%"], "keep_ratio: expected a number in"),
        (["--preset", "llava-1.5-7b", "--calibration", "missing.json"], "missing.json"),
        (["--preset", "llava-1.5-7b", "--", "--use_cache", "c"], "--use_cache: expected none"),
    ],
)
def test_bad_arguments_stop_before_any_run(
    arguments: list[str], message: str, runs: Runs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        rows.main(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not runs.commands


def test_the_page_names_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "bench" / "accuracy.md").read_text()
    commands = re.findall(r"^python -m bench\.accuracy (--preset.*?)(?: *#.*)?$", page, re.MULTILINE)
    assert {command.split()[1] for command in commands} == set(rows.PRESETS)
    for command in commands:
        rows.parse([word for word in shlex.split(command) if word != "calibration.json" and word != "--calibration"])
    counts = {"llava-1.5-7b": (576, "192 128 64"), "llava-next-7b": (2880, "640 320 160")}
    for name, (tokens, keeps) in counts.items():
        assert rows.PRESETS[name].keeps == tuple(keeps.split())
        assert f"{tokens}" in page
    for task in rows.SCORES:
        assert task in page
