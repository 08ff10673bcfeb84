"""Starts engines that must not start, one after the other: python startup.py FOLDER; prints what they say as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import tiny
import transformers
import vllm
from vllm.config import CUDAGraphMode

BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no_tokens": ("llava", {"script_keep": 0}, {}),
    "both_budgets": ("llava", {"script_keep": 4, "script_keep_ratio": 0.5}, {}),
    "no_share": ("llava", {"script_keep_ratio": 1.5}, {}),
    "unknown": ("llava", {"script_keep": 4, "script_gamma2": 1}, {}),
    "bad_option": ("llava", {"script_keep": 4, "script_gsp_drop": 2}, {}),
    "family": ("llava_onevision", {"script_keep": 4}, {}),
    "no_method": ("llava", {"script_keep": 4, "script_method": "best"}, {}),
    "bad_method_option": ("llava", {"script_keep": 4, "script_method": "cdpruner", "script_power": -1}, {}),
    "unasked_relevance": ("llava", {"script_keep": 4, "script_method": "relevance"}, {}),
    "asked_encoder": ("llava", {"script_keep": 4, "script_query": "text"}, {"mm_encoder_only": True}),
    "old_engine": ("llava", {"script_keep": 4}, {}),
    "own_pruning": ("qwen2_5_vl", {"script_keep": 4}, {"video_pruning_rate": 0.5}),
}


def save_unsupported(folder: Path, like: Path) -> None:
    """A model that vLLM serves and that we cannot prune: what is read before its weights are."""
    shutil.copytree(like, folder)
    known = transformers.AutoConfig.from_pretrained(like)
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny._VISION, image_size=56, patch_size=14),
        text_config=known.text_config,
        image_token_index=tiny.IMAGE,
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )
    config.save_pretrained(folder)


def with_graphs(mode: Any) -> str:
    """What a model with (t, h, w) positions says to a mode of CUDA graphs, which the CPU engine has not."""
    from script_kernels.vllm import models

    class Plain:
        def __init__(self, **kwargs: Any) -> None:
            pass

    class Model(models.PrunedMrope, Plain):
        pass

    multimodal = SimpleNamespace(
        mm_processor_kwargs={"script_keep": 4}, mm_encoder_only=False, is_multimodal_pruning_enabled=lambda: False
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal, get_hidden_size=lambda: 8),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False, cudagraph_mode=mode),
        lora_config=None,
        speculative_config=None,
    )
    try:
        Model(vllm_config=config)
    except ValueError as error:
        return str(error)
    return "started"


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for family in ("llava", "qwen2_5_vl"):
        tiny.save(family, root / family)
    save_unsupported(root / "llava_onevision", root / "llava")
    said = {}
    version = vllm.__version__
    for name, (family, settings, arguments) in BAD.items():
        vllm.__version__ = "0.30.2" if name == "old_engine" else version
        try:
            engines.start(root / family, settings, **arguments)
            said[name] = "started"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    vllm.__version__ = version
    for mode in CUDAGraphMode:
        said[f"graphs_{mode.name}"] = with_graphs(mode)
    print("TOLD", json.dumps(said))
