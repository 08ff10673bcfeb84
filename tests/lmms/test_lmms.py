"""bench.accuracy on the lmms-eval package: a random LLaVA, and a task of pictures and questions in local files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_vlm import photo, save_llava
from tiny_vlm import transformers

from script_kernels.transformers import prune_inputs

QUESTIONS = ("what is the car ?", "what colour is the car ?", "is the car what colour ?", "is what the car ?")
KEEP = 5
NEW = 6
TASK = """\
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: {new}
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
VISUAL = """\
from PIL import Image
def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
# A plain run of lmms-eval, which writes down what its model was given and what it said.
PLAIN = """
import sys, torch, transformers
from lmms_eval.cli.dispatch import main
seen, generate = [], transformers.LlavaForConditionalGeneration.generate
def noting(self, *args, **kwargs):
    out = generate(self, *args, **kwargs)
    seen.append((kwargs["input_ids"], out))
    return out
transformers.LlavaForConditionalGeneration.generate = noting
path = sys.argv.pop(1)
main()
torch.save(seen, path)
"""


@dataclass(frozen=True)
class World:
    """A saved model, a task whose right answers are what the unpruned model says, and lmms-eval's arguments."""

    folder: Path
    arguments: list[str]
    answers: dict[str, list[str]]  # by method; "unpruned" too


def answers_of(folder: Path, pictures: list[Any], **pruning: Any) -> list[str]:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    said = []
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        prompt = f"USER : <image> {question} ASSISTANT :"
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        if pruning:
            inputs = prune_inputs(model, inputs, KEEP, tokenizer=processor, **pruning)
        end = processor.tokenizer.eos_token_id
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=end, eos_token_id=end)
        said += processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").mkdir()
    (folder / "tasks").mkdir()
    save_llava(folder / "model")
    pictures = [photo(120, 90, seed) for seed in range(len(QUESTIONS))]
    answers = {"unpruned": answers_of(folder / "model", pictures)}
    answers |= {method: answers_of(folder / "model", pictures, method=method) for method in ("script", "random")}
    with (folder / "questions.jsonl").open("w") as file:
        for i, (picture, question) in enumerate(zip(pictures, QUESTIONS, strict=True)):
            picture.save(folder / f"{i}.png")
            doc = {"image": str(folder / f"{i}.png"), "question": question, "answer": answers["unpruned"][i]}
            file.write(json.dumps(doc) + "\n")
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(questions=folder / "questions.jsonl", new=NEW))
    (folder / "tasks" / "tiny.py").write_text(VISUAL)
    arguments = [
        "--model",
        "llava_hf",
        "--model_args",
        f"pretrained={folder / 'model'},device=cpu,device_map=cpu,dtype=float32",
    ]
    return World(folder, [*arguments, "--tasks", "tiny", "--include_path", str(folder / "tasks")], answers)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
    print(done.stdout[-4000:], done.stderr[-4000:])
    return done


def said_in(folder: Path) -> list[str]:
    """The answers that lmms-eval wrote down, in the order of the questions."""
    (path,) = folder.glob("**/*_samples_tiny.jsonl")
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [
        row["filtered_resps"][0] if isinstance(row["filtered_resps"], list) else row["filtered_resps"] for row in rows
    ]


def one(world: World, folder: Path, pruning: dict[str, Any], *more: str) -> tuple[int, dict[str, Any]]:
    given = ["--folder", str(folder), "--pruning", json.dumps(pruning), "--", *world.arguments, *more]
    folder.mkdir(exist_ok=True)
    code = run("-m", "bench.accuracy", "one", *given).returncode
    return code, json.loads((folder / "run.json").read_text())


def test_the_task_can_tell_methods_apart(world: World) -> None:
    assert all(world.answers["unpruned"])
    assert world.answers["unpruned"] != world.answers["script"] != world.answers["random"]


def test_one_table_of_all_rows_that_is_not_run_twice(world: World, tmp_path: Path) -> None:
    """Unpruned: plain lmms-eval's answers. Pruned: those of prune_inputs, and the whole prompt comes back."""
    more = ["--model", "llava_hf", "--model-args", world.arguments[3], "--tasks", "tiny", "--out", str(tmp_path)]
    more += ["--keep", str(KEEP), "--method", "script", "--method", "random"]
    more += ["--", "--include_path", str(world.folder / "tasks")]
    assert run("-m", "bench.accuracy", *more).returncode == 0
    out = tmp_path / "llava_hf"
    folders = {name: next(out.glob(f"{name}-*")) for name in world.answers}
    for name, answers in world.answers.items():
        assert said_in(folders[name]) == answers, name
        stored = json.loads((folders[name] / "run.json").read_text())
        seen = stored["seen"]
        right = sum(map(str.__eq__, answers, world.answers["unpruned"])) / len(QUESTIONS)
        assert stored["scores"] == {"tiny": {"exact_match": right}}
        assert stored["samples"] == {"tiny": len(QUESTIONS)}
        assert stored["void"] == seen["errors"] == []
        assert seen["prompts"] == seen["with_images"] == len(QUESTIONS)
        assert (seen["tokens_before"], seen["tokens_after"]) == (
            (0, 0) if name == "unpruned" else (36 * len(QUESTIONS), KEEP * len(QUESTIONS))
        )
        assert stored["versions"]["lmms-eval"] == "0.7.3"
    with (out / "table.csv").open() as file:
        shares = {row["row"]: float(row["share"]) for row in csv.DictReader(file)}
    assert shares["unpruned"] == 1 > max(shares["script"], shares["random"])
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| method | keep | tiny exact_match | mean share |"
    assert lines[2] == "| unpruned | all | 1 |  |"

    times = {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    again = run("-m", "bench.accuracy", *more)
    assert again.returncode == 0
    assert "3 runs, 3 of them done" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}

    # KEEP=0, so to speak, is lmms-eval itself: same prompts, same sequences.
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    plain = [str(tmp_path / "seen.pt"), *world.arguments, "--output_path", str(tmp_path / "plain"), "--log_samples"]
    assert run(str(script), *plain).returncode == 0
    assert said_in(tmp_path / "plain") == said_in(folders["unpruned"])
    seen = torch.load(tmp_path / "seen.pt")
    assert len(seen) == len(QUESTIONS)

    # The same witness inside a pruned run: lmms-eval gets its whole prompt back, so that it cuts the answer off right.
    script.write_text(
        PLAIN.replace("from lmms_eval.cli.dispatch import main", "from bench.accuracy.lmms import main").replace(
            "\nmain()\n",
            "\nfrom bench.accuracy import lmms\nwatch = lmms.watch\n" + WITNESS + "\nassert main(sys.argv[1:]) == 0\n",
        )
    )
    pruned = [str(tmp_path / "pruned.pt"), "--folder", str(tmp_path), "--pruning", json.dumps({"keep": KEEP}), "--"]
    assert run(str(script), *pruned, *world.arguments).returncode == 0
    for (prompt, _), (same, out_ids) in zip(seen, torch.load(tmp_path / "pruned.pt"), strict=True):
        assert torch.equal(prompt, same)
        assert torch.equal(out_ids[:, : prompt.shape[1]], prompt)
        assert prompt.shape[1] < out_ids.shape[1] <= prompt.shape[1] + NEW


# Notes what lmms-eval's model class gets of the watched `generate`, not what the pruned model sees.
WITNESS = """
seen.clear()
transformers.LlavaForConditionalGeneration.generate = generate
def watching(model, *rest):
    watch(model, *rest)
    inner = model.generate
    def outer(*args, **kwargs):
        out = inner(*args, **kwargs)
        seen.append((kwargs["input_ids"], out))
        return out
    model.generate = outer
lmms.watch = watching
"""


def test_an_exception_in_generate_voids_the_run_that_lmms_eval_calls_a_success(world: World, tmp_path: Path) -> None:
    code, stored = one(world, tmp_path / "run", {"keep": KEEP}, "--gen_kwargs", "max_new_tokens=0")
    assert code == 1
    assert len(stored["seen"]["errors"]) == len(QUESTIONS)
    assert "4 errors in generating, the first: ValueError: " in stored["void"][0]
    assert stored["scores"] == {"tiny": {"exact_match": 0.0}}  # what llava_hf made of it
    assert said_in(tmp_path / "run") == [""] * len(QUESTIONS)


def test_a_run_that_lmms_eval_gave_up_is_void(world: World, tmp_path: Path) -> None:
    code, stored = one(world, tmp_path / "run", {"keep": KEEP}, "--tasks", "no_such_task")
    assert code == 1
    assert stored["void"] == ["lmms-eval left no score", "no prompt had an image"]


def test_a_budget_that_drops_nothing_is_void(world: World, tmp_path: Path) -> None:
    code, stored = one(world, tmp_path / "run", {"keep": 36})
    assert code == 1
    assert stored["void"] == [f"no token was dropped of {36 * len(QUESTIONS)}"]
