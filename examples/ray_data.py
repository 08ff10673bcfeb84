"""One question about each image of a folder, by Ray Data and vLLM with the images pruned.

    pip install "ray[data]"     # beside vLLM and this package
    python examples/ray_data.py --model Qwen/Qwen2.5-VL-7B-Instruct --images photos --out answers --keep 0.22

Writes JSON lines of path, answer, prompt_tokens. Ray Data schedules, retries what a lost worker had, and starts another
in its place; the plugin prunes in each engine by itself. Settings: docs/serving.md.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from typing import Any

import ray
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def config(arguments: argparse.Namespace) -> vLLMEngineProcessorConfig:
    engine = {"mm_processor_kwargs": {"script_keep_ratio": arguments.keep}, **json.loads(arguments.engine)}
    return vLLMEngineProcessorConfig(
        model_source=arguments.model,
        engine_kwargs=engine,
        concurrency=arguments.workers,
        batch_size=arguments.batch,
        # A worker without a GPU, where vLLM is built for the CPU.
        placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 0 if arguments.cpu else 1}},
        log_engine_metrics=False,  # vLLM's metrics in Ray want ray[serve]
        # Images are opened here: Ray 2.60's own stage looks for a module where vLLM 0.32 has none any more.
        prepare_multimodal_stage=False,
        # vLLM's own: it has to find the places of the images among the ids.
        tokenize_stage=False,
        detokenize_stage=False,
    )


def request(row: dict[str, Any], question: str, tokens: int) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "path": row["path"],
        "messages": [{"role": "user", "content": content}],
        "multimodal_data": {"image": Image.open(io.BytesIO(row["bytes"])).convert("RGB")},
        "sampling_params": {"temperature": 0, "max_tokens": tokens},
    }


def answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"path": row["path"], "answer": row["generated_text"], "prompt_tokens": row["num_input_tokens"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name of the hub, or a folder")
    parser.add_argument("--images", required=True, help="a folder of images, here or in object storage")
    parser.add_argument("--out", required=True, help="a folder for the answers")
    parser.add_argument("--question", default="Describe the image.")
    parser.add_argument("--keep", type=float, default=0.22, help="the share of an image's tokens that stays")
    parser.add_argument("--tokens", type=int, default=64, help="the most that an answer may have")
    parser.add_argument("--workers", type=int, default=1, help="engines")
    parser.add_argument("--batch", type=int, default=16, help="images that go to an engine at once")
    parser.add_argument("--cpu", action="store_true", help="engines need no GPU")
    parser.add_argument("--engine", default="{}", help="further arguments of vLLM's engine, as JSON")
    arguments = parser.parse_args(argv)

    ray.init(ignore_reinit_error=True)
    images = ray.data.read_binary_files(arguments.images, include_paths=True)
    processor = build_processor(
        config(arguments),
        preprocess=lambda row: request(row, arguments.question, arguments.tokens),
        postprocess=answer,
    )
    # Small blocks, so that what a lost worker held is little to do again.
    processor(images.repartition(max(1, -(-images.count() // arguments.batch)))).write_json(arguments.out)


if __name__ == "__main__":
    main()
