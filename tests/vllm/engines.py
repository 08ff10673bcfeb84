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


def start(folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    from vllm import LLM

    arguments = {"dtype": "float32", "max_model_len": 1024, "limit_mm_per_prompt": {"image": 4}, **arguments}
    return LLM(
        str(folder),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        mm_processor_kwargs=settings,
        seed=0,
        disable_log_stats=False,
        **arguments,
    )


def ask(engine: Any, prompts: list[tuple[str, list[Any]]], **request: Any) -> list[dict[str, Any]]:
    """Per prompt: its length, the tokens of a greedy answer, and their log-probabilities."""
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
        answers.append({"length": len(result.prompt_token_ids), "tokens": list(out.token_ids), "scores": scores})
    return answers


def reference(folder: Path, family: str, prompts: list[tuple[str, list[Any]]], **pruning: Any) -> list[dict[str, Any]]:
    """The same from transformers; `pruning` of prune_inputs, or nothing for the whole prompt."""
    from script_kernels.transformers import prune_inputs

    model = tiny.make_model(family)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = []
    for text, images in prompts:
        inputs = dict(processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False))
        if images and pruning:
            inputs = prune_inputs(model, inputs, **pruning)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
                pad_token_id=0, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        tokens = out.sequences[0, -TOKENS:].tolist()
        scores = [float(s[0].log_softmax(-1)[token]) for s, token in zip(out.scores, tokens, strict=True)]
        answers.append({"length": length, "tokens": tokens, "scores": scores})
    return answers


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of log-probabilities, infinite where the tokens differ."""
    if a["tokens"] != b["tokens"]:
        return float("inf")
    return max(abs(x - y) for x, y in zip(a["scores"], b["scores"], strict=True))
