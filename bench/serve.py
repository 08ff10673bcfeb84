"""vLLM's server with and without pruning, by vLLM's own `bench serve`: python -m bench serve --out bench/out/serve

Requests a second, time to the first token and tokens a second for the stock engine (VLLM_PLUGINS="") and for the plugin
at 100, 50, 22 and 11 % of the tokens, for prompts of 576 and 2880 image tokens, at 1, 4, 16 and 32 in flight. A LLaVA
of random weights whose time goes into the prompt: its tower is small, and images are of 24 x 24 tokens as in LLaVA-1.5,
one or five a prompt.
Both servers live throughout, and a case's measurements follow each other, so that what else the machine does meets all
of them; the prefix cache is off and no image comes twice. With --repeats the engines take turns; a row is the median of
its repeats, and its speed-up that of the quotients within one. Needs the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RATIOS = (1.0, 0.5, 0.22, 0.11)  # beside the stock engine
IN_FLIGHT = (1, 4, 16, 32)
IMAGES = (1, 5)  # of 576 tokens, a prompt
SIDE = 336
COLUMNS = ("image_tokens", "in_flight", "keep", "requests", "repeats", "requests_s", "ttft_ms", "tokens_s", "speedup")
SPEEDS = ("request_throughput", "mean_ttft_ms", "output_throughput")


def save_model(folder: Path, tiny: Any, layers: int, width: int) -> None:
    import transformers

    tokenizer = tiny.make_tokenizer("<image>")
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=200, max_position_embeddings=4096, tie_word_embeddings=False,
        pad_token_id=tiny.PAD, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS,
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(**tiny._clip(SIDE))
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=tiny.IMAGE)
    tiny.write(transformers.LlavaForConditionalGeneration(config), processor, folder)


def measure(
    server: Any, model: Path, images: int, in_flight: int, ratio: float | None, requests: int, seed: int
) -> Any:
    """One run of `vllm bench serve`, in this process."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    limits = {"image": images, "video": 0}
    body = {} if ratio is None else {"mm_processor_kwargs": {"script_keep_ratio": ratio}}
    arguments = [
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.root,
        "--model", str(model), "--served-model-name", "tiny", "--dataset-name", "random-mm",
        "--random-input-len", "16", "--random-output-len", "8", "--random-range-ratio", "0",
        "--random-mm-base-items-per-request", str(images), "--random-mm-num-mm-items-range-ratio", "0",
        "--random-mm-limit-mm-per-prompt", json.dumps(limits),
        "--random-mm-bucket-config", f"{{({SIDE}, {SIDE}, 1): 1.0}}",
        "--num-prompts", str(requests), "--max-concurrency", str(in_flight), "--seed", str(seed), "--ignore-eos",
        "--temperature", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0", "--extra-body", json.dumps(body),
    ]  # fmt: skip
    result = main(parser.parse_args(arguments))
    if result["failed"] or result["completed"] != requests:
        raise RuntimeError(f"bench serve: expected {requests} answers, got {result['completed']}: {result['errors']}")
    return result


def run(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "vllm"))
    import server
    import tiny

    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SCRIPT_", "VLLM_", "PROMETHEUS"))
    }
    environment = {**kept, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = {
        "max-model-len": 4096, "kv-cache-memory-bytes": 2 << 30, "max-num-batched-tokens": 4096, "max-num-seqs": 32,
        "limit-mm-per-prompt": json.dumps({"image": max(IMAGES)}),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        model = Path(scratch) / "model"
        save_model(model, tiny, options.layers, options.width)
        servers = {
            name: running.enter_context(
                server.serving(model, options.out / f"{name}.log", {**environment, **own}, **arguments)
            )
            for name, own in (("stock", {"VLLM_PLUGINS": ""}), ("plugin", {"SCRIPT_KEEP_RATIO": "1"}))
        }
        end = time.monotonic() + 60 * options.minutes
        for one in servers.values():  # what the first request alone has to wait for
            measure(one, model, max(IMAGES), 1, None, 1, seed=0)
        ratios, seed = [None, *options.keep], 0
        for images, in_flight in itertools.product(IMAGES, IN_FLIGHT):
            if time.monotonic() > end:
                print(f"bench serve: {options.minutes:g} minutes are over: the rest is left out")
                break
            requests = max(options.requests, in_flight)
            taken: dict[float | None, list[list[float]]] = {ratio: [] for ratio in ratios}
            for _ in range(options.repeats):
                for ratio in ratios:
                    seed += 1
                    one = servers["stock" if ratio is None else "plugin"]
                    got = measure(one, model, images, in_flight, ratio, requests, seed)
                    taken[ratio].append([float(got[key]) for key in SPEEDS])
            for ratio, repeats in taken.items():
                name = "stock" if ratio is None else f"{ratio:.0%}"
                speeds = [statistics.median(column) for column in zip(*repeats, strict=True)]
                gains = [mine[0] / base[0] for mine, base in zip(repeats, taken[None], strict=True)]
                values = [round(value, 3) for value in (*speeds, statistics.median(gains))]
                row = (576 * images, in_flight, name, requests, options.repeats, *values)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                print(rows[-1], flush=True)
            write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """serve.csv and serve.md, whole after each case."""
    with (options.out / "serve.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[name]) for name in COLUMNS] for row in rows)]
    head = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, commit {commit.strip() or 'unknown'}; "
        f"{options.layers} layers of width {options.width}, float32, 8 tokens an answer\n\n"
    )
    text = head + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (options.out / "serve.md").write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "serve")
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="of an environment with vLLM"
    )
    parser.add_argument("--requests", type=int, default=4, help="of a measurement, at least as many as are in flight")
    parser.add_argument("--keep", type=float, nargs="+", default=RATIOS, help="shares of the image tokens")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of a row, the engines taking turns")
    parser.add_argument("--minutes", type=float, default=10, help="no case starts later")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        run(options)
        return 0
    if not Path(options.python).exists():
        parser.error(f"--python: expected an environment with vLLM (make test-vllm makes one), got {options.python}")
    given = sys.argv[2:] if arguments is None else arguments
    return subprocess.call([options.python, "-m", "bench.serve", *given, "--inside"], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
