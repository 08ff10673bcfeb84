"""One run of lmms-eval's own command line, with the model that it loads pruned inside `generate`.

lmms-eval looks its models up in a registry: the model that the command line names is registered anew, as a subclass
that prunes what its parent loaded. What follows is lmms-eval's. A run counts only if `run.json` says that nothing voids
it, since lmms-eval ends with status 0 after any error, and `llava_hf` takes an exception in `generate` for an empty
answer.
"""

from __future__ import annotations

import argparse
import contextvars
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from script_kernels.transformers import prune_inputs, script_pruning
from script_kernels.transformers.families import parameters
from script_kernels.transformers.prune import has_pixels
from script_kernels.transformers.select import Budget, settings
from script_kernels.version import __version__

PACKAGES = ("lmms-eval", "transformers", "torch")
# Arguments of lmms-eval under which a run would not be what it says, and why.
REFUSED = {
    "--config": "the model has to be named here, to be pruned",
    "--use_cache": "answers kept from a run with other pruning would be taken for this one's",
    "--launcher_args": "the model has to run in this process",
    "--predict_only": "there would be no score",
    "--output_path": "results go to --folder",
}
NOT_OPTIONS = {"model", "inputs", "tokenizer", "options"}


@dataclass
class Seen:
    """What `generate` was asked for. Tokens are visual ones, over all prompts."""

    prompts: int = 0
    with_images: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    errors: list[str] = field(default_factory=list)


def check_pruning(pruning: dict[str, Any]) -> None:
    """Raises what `prune_inputs` would raise for these arguments; {} is the unpruned model."""
    if not pruning:
        return
    given = dict(pruning)
    own = {name: given.pop(name) for name in list(given) if name in set(parameters(prune_inputs)) - NOT_OPTIONS}
    how = {name: own[name] for name in ("method", "reduce", "per", "newlines", "min_tokens") if name in own}
    if own.get("calibration") is not None and (given or {"method", "reduce"} & set(own)):
        raise ValueError("calibration: expected no method, reduce or options with it, as it sets them, got both")
    ratio = own.get("keep_ratio")
    found = settings(own.get("calibration"), own.get("keep"), ratio, own.get("query", "text"))
    found.pop("query")
    arguments: dict[str, Any] = {"keep_ratio": ratio, "options": given} | how | found
    Budget(**arguments)


def processor_of(lm: Any) -> Any:
    """The processor of a model class of lmms-eval: what finds the user's words in a prompt."""
    for name in ("processor", "_processor", "_image_processor"):
        found = getattr(lm, name, None)
        if hasattr(found, "tokenizer"):
            return found
    raise TypeError(f"--model: expected a model with a transformers processor, got {type(lm).__name__}")


def watch(model: Any, processor: Any, pruning: dict[str, Any], seen: Seen, stack: ExitStack) -> None:
    """Prunes in `model.generate` from now on, and notes what it was asked for and what went wrong."""
    last = stack.enter_context(script_pruning(model, tokenizer=processor, **pruning)) if pruning else None
    context = contextvars.copy_context()  # pruning is on where it was opened: a thread of lmms-eval's gets it from here
    generate = model.generate

    @functools.wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            seen.prompts += len(kwargs["input_ids"])
            images = has_pixels(model, kwargs)
            seen.with_images += images
            if last is not None:
                last.stats = None
            out = context.copy().run(generate, *args, **kwargs)
            if last is not None and images:
                if last.stats is None:
                    raise RuntimeError("expected pruning, as there are images, got none")
                seen.tokens_before += sum(last.stats.visual_before)
                seen.tokens_after += sum(last.stats.visual_after)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            raise
        return out

    model.generate = watched


def register(name: str, simple: bool, pruning: dict[str, Any], seen: Seen, stack: ExitStack) -> None:
    """Puts a watched subclass in the place of lmms-eval's model of this name."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    registry = models.MODEL_REGISTRY_V2
    found = registry.resolve(name, force_simple=simple)
    base: Any = registry.get_model_class(name, force_simple=simple)

    class Watched(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch(self.model, processor_of(self), pruning, seen, stack)

        def loglikelihood(self, requests: Any) -> Any:
            seen.errors.append("expected tasks that generate text, as others read logits of the whole prompt, got one")
            raise NotImplementedError(seen.errors[-1])

    Watched.__name__ = base.__name__
    globals()["Watched"] = Watched
    path = {f"{found.model_type}_class_path": f"{__name__}.Watched"}
    registry.register_manifest(ModelManifest(found.model_id, **path), overwrite=True)


def read_results(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Of lmms-eval's newest results: the metrics of each task, and how many samples each had."""
    files = sorted(folder.glob("**/*_results.json"))
    if not files:
        return {}, {}
    stored = json.loads(files[-1].read_text())
    scores = {
        task: {
            name.partition(",")[0]: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name
        }
        for task, metrics in stored["results"].items()
    }
    samples = {task: int(count["effective"]) for task, count in stored["n-samples"].items()}
    return scores, samples


def voids(seen: Seen, pruned: bool, scores: dict[str, dict[str, float]], samples: dict[str, int]) -> list[str]:
    """Why a run does not count; nothing if it does."""
    found = []
    if seen.errors:
        found.append(f"{len(seen.errors)} errors in generating, the first: {seen.errors[0]}")
    if not scores or not all(scores.values()):
        found.append("lmms-eval left no score")
    if seen.prompts < sum(samples.values()):
        found.append(f"{sum(samples.values())} answers of {seen.prompts} prompts: some were not generated here")
    if pruned and not seen.with_images:
        found.append("no prompt had an image")
    elif pruned and seen.tokens_after >= seen.tokens_before:
        found.append(f"no token was dropped of {seen.tokens_before}")
    return found


def versions() -> dict[str, str]:
    return {"script-kernels": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"


def check_arguments(arguments: list[str]) -> argparse.Namespace:
    """The model that lmms-eval's arguments name; exits if they would make the run something else."""
    parser = argparse.ArgumentParser(prog="lmms-eval", allow_abbrev=False, add_help=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--force_simple", action="store_true")
    for name in REFUSED:
        parser.add_argument(name, nargs="?", const=True)
    given = parser.parse_known_args(arguments)[0]
    for name, why in REFUSED.items():
        if getattr(given, name[2:]) is not None:
            parser.error(f"{name}: expected none, as {why}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("WORLD_SIZE: expected 1, as a run is one process (give each GPU rows of its own)")
    return given


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy one", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for run.json and lmms-eval's own results")
    parser.add_argument("--pruning", type=json.loads, default={}, help="JSON: arguments of prune_inputs; {}: unpruned")
    parser.add_argument("--label", default="", help="noted in run.json")
    parser.add_argument("lmms", nargs="+", metavar="-- lmms-eval's arguments")
    options = parser.parse_args(arguments)
    try:
        check_pruning(options.pruning)
    except (TypeError, ValueError, OSError) as error:
        parser.error(f"--pruning: {error}")
    named = check_arguments(options.lmms)

    results = options.folder / "lmms-eval"
    for old in results.glob("**/*_results.json"):  # of a run that was void or cut
        old.unlink()
    seen, start = Seen(), time.time()
    with ExitStack() as stack:
        register(named.model, named.force_simple, options.pruning, seen, stack)
        from lmms_eval.cli.dispatch import main as dispatch

        sys.argv = ["lmms-eval", *options.lmms, "--output_path", str(results), "--log_samples"]
        dispatch()
    scores, samples = read_results(results)
    why = voids(seen, bool(options.pruning), scores, samples)
    run = {
        "label": options.label,
        "pruning": options.pruning,
        "arguments": options.lmms,
        "void": why,
        "scores": scores,
        "samples": samples,
        "seen": asdict(seen) | {"errors": seen.errors[:10]},
        "versions": versions(),
        "device": device(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - start),
    }
    part = options.folder / "run.json.part"
    part.write_text(json.dumps(run, indent=1))
    part.replace(options.folder / "run.json")
    for reason in why:
        print(f"bench.accuracy: void: {reason}", file=sys.stderr)
    return 1 if why else 0
