"""One engine a process: started with settings, asked prompts, compared with transformers on the same weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
import transformers

TOKENS = 24
KV_CACHE = 64 << 20


def start(folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    from vllm import LLM

    arguments = {"dtype": "float32", "max_model_len": 1024, "limit_mm_per_prompt": {"image": 4}, **arguments}
    return LLM(
        str(folder),
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE,
        block_size=32,
        mm_processor_kwargs=settings,
        seed=0,
        disable_log_stats=False,
        **arguments,
    )


def core(engine: Any) -> Any:
    """The engine's core, which runs in this process."""
    return engine.llm_engine.engine_core.engine_core


def runner(engine: Any) -> Any:
    return core(engine).model_executor.driver_worker.worker.model_runner


def forget(engine: Any, *, answers: bool = True, encoded: bool = False) -> None:
    """Empties the prefix cache, the encoder cache, or both."""
    if answers and not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache was in use")
    if encoded:
        engine.llm_engine.reset_encoder_cache()


def chunk(engine: Any, tokens: int) -> None:
    """Prefill goes on in chunks of so many tokens, 0: as many as fit a step."""
    scheduler = core(engine).scheduler
    scheduler.scheduler_config.long_prefill_token_threshold = tokens
    scheduler.adaptive_long_prefill_threshold = False


class Watch:
    """What the encoder and the selection do: images encoded, indices chosen, steps of prefill, cache identities."""

    def __init__(self, engine: Any) -> None:
        from script_kernels.vllm import models

        self.engine = engine
        self.encoded = 0
        self.steps: list[int] = []  # tokens of each step
        # Of each request that had to give its blocks back: tokens that were computed, and images among them.
        self.preempted: list[list[int]] = []
        self.chosen: list[list[int] | None] = []
        self.places: list[list[list[int]]] = []  # (t, h, w) of the visual tokens of each step
        self.grids: list[list[int]] = []  # (t, h, w) of each encoded image, in patches
        self.shapes: list[Any] = []  # of the grids in which the tokens lie of each image that was chosen from
        model, choose = runner(engine).model, models.choose
        embed, execute = model.embed_multimodal, runner(engine).execute_model
        scheduler = core(engine).scheduler
        preempt = scheduler._preempt_request

        def counted(**kwargs: Any) -> Any:
            if "image_grid_thw" in kwargs:
                self.grids += kwargs["image_grid_thw"].tolist()
            features = embed(**kwargs)
            self.encoded += len(features)
            return features

        def recorded(*arguments: Any) -> Any:
            chosen = choose(*arguments)
            self.shapes += arguments[5]
            self.chosen += [own if own is None else own.tolist() for own in chosen]
            return chosen

        def stepped(output: Any, *arguments: Any, **kwargs: Any) -> Any:
            if output.total_num_scheduled_tokens:
                self.steps.append(output.total_num_scheduled_tokens)
            return execute(output, *arguments, **kwargs)

        def preempting(request: Any, *arguments: Any, **kwargs: Any) -> Any:
            done = request.num_computed_tokens
            images = sum(f.mm_position.offset + f.mm_position.length <= done for f in request.mm_features)
            self.preempted.append([done, images])
            return preempt(request, *arguments, **kwargs)

        model.embed_multimodal, models.choose = counted, recorded
        runner(engine).execute_model, scheduler._preempt_request = stepped, preempting
        if hasattr(model, "take_places"):
            take = model.take_places

            def taken(*arguments: Any) -> Any:
                rows = take(*arguments)
                self.places.append(model._places[1].tolist())
                return rows

            model.take_places = taken

    def clear(self) -> None:
        self.encoded = 0
        self.steps, self.chosen, self.places, self.grids, self.preempted, self.shapes = [], [], [], [], [], []

    def seen(self) -> dict[str, Any]:
        """What happened since the last call, and what the encoder cache holds now."""
        report = {
            "encoded": self.encoded,
            "steps": self.steps,
            "preempted": self.preempted,
            "chosen": self.chosen,
            "places": self.places,
            "grids": self.grids,
            "shapes": self.shapes,
            "identities": sorted(runner(self.engine).encoder_cache),
        }
        self.clear()
        return report


def ask(engine: Any, prompts: list[tuple[str, list[Any]]], **request: Any) -> list[dict[str, Any]]:
    """Per prompt: its length, the tokens of a greedy answer, and their log-probabilities.

    cached: tokens of the prompt that came from the prefix cache.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    given = []
    for text, images in prompts:
        one: dict[str, Any] = {"prompt": text}
        if images:
            one["multi_modal_data"] = {"image": images}
            if request:
                one["mm_processor_kwargs"] = request
        given.append(one)
    answers = []
    for result in engine.generate(given, sampling, use_tqdm=False):
        out = result.outputs[0]
        scores = [step[token].logprob for token, step in zip(out.token_ids, out.logprobs, strict=True)]
        answers.append(
            {
                "length": len(result.prompt_token_ids),
                "tokens": list(out.token_ids),
                "scores": scores,
                "cached": result.num_cached_tokens,
            }
        )
    return answers


def reference(
    folder: Path, family: str, prompts: list[tuple[str, list[Any]]], *, chat: bool = False, **pruning: Any
) -> list[dict[str, Any]]:
    """The same from transformers; `pruning` of prune_inputs, or nothing for the whole prompt.

    shapes: of the grids in which the tokens of each image lie, where the method asks for them.
    chat: prune_inputs gets the chat template, to find the user's words.
    """
    from script_kernels.transformers import prune_inputs
    from script_kernels.transformers.select import watched

    model = tiny.make_model(family)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = []
    for text, images in prompts:
        shapes: list[Any] = []
        inputs = dict(processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False))
        if images and pruning:
            with watched() as choices:
                inputs = prune_inputs(model, inputs, tokenizer=processor.tokenizer if chat else None, **pruning)
            shapes = [facts.get("grids") for choice in choices for facts in choice.facts]
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
                pad_token_id=0, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        tokens = out.sequences[0, -TOKENS:].tolist()
        scores = [float(s[0].log_softmax(-1)[token]) for s, token in zip(out.scores, tokens, strict=True)]
        answers.append({"length": length, "tokens": tokens, "scores": scores, "shapes": shapes})
    return answers
