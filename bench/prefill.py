"""python -m bench prefill: time to first token of whole models, with and without pruning. Random weights, no downloads.

A preset is a config and the numbers of tokens to keep; `--config` takes any supported model's config.json instead. The
runs take turns (unpruned, first keep, second keep, ...), and medians of the rounds are reported, part by part.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import transformers

from bench import memory, report
from bench.targets import Target
from script_kernels.transformers import kv_cache_bytes, prefill_flops, prune_inputs

OUT = pathlib.Path(__file__).parent / "out"
IMAGE, VIDEO, TEXT_TOKENS = 31998, 31997, 40


@dataclass(frozen=True)
class Preset:
    """A model made from its config, and the targets it is held to (0: none)."""

    config: Callable[[], Any]
    keeps: tuple[int, ...]
    dtype: torch.dtype
    gpu: bool
    speedup: float = 0.0  # LLM prefill, pruning included, at the smallest keep
    flops: float = 0.0  # prefill FLOPs, at the smallest keep
    share: float = 0.0  # pruning over the unpruned LLM prefill, at most


def llama(**sizes: int) -> Any:
    return transformers.LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **sizes)


def llava_next_7b() -> Any:
    return transformers.LlavaNextConfig(text_config=llama(), image_token_index=IMAGE)


def llava_7b() -> Any:
    return transformers.LlavaConfig(text_config=llama(), image_token_index=IMAGE)


def qwen_7b() -> Any:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )


def llava_next_tiny() -> Any:
    """LLaVA-NeXT's 5 tiles of 576 tokens, with towers small enough for two CPU cores."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
    text = llama(hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12)
    return transformers.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)


BF16, FP32 = torch.bfloat16, torch.float32
PRESETS = {
    "llava-next-tiny": Preset(llava_next_tiny, (640, 320, 160), FP32, False, speedup=6.8, share=0.05),
    "llava-next-7b": Preset(llava_next_7b, (640, 320, 160), BF16, True, speedup=6.8, flops=10.0, share=0.01),
    "llava-1.5-7b": Preset(llava_7b, (192, 128, 64), BF16, True),
    "qwen2.5-vl-7b": Preset(qwen_7b, (324, 162, 81), BF16, True),
}


# --- one model and one prompt


def make_model(config: Any, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return transformers.AutoModelForImageTextToText.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)


def make_inputs(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """One prompt with one image at the model's native any-resolution, tile or grid layout, and TEXT_TOKENS words."""
    config = model.config
    vision = config.vision_config
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs: dict[str, Any] = {}
    kind = config.model_type
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        side = 72
        grid = torch.tensor([[1, side, side]], device=device)
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs = {"pixel_values": noise(side * side, patch), "image_grid_thw": grid}
    elif kind == "internvl":
        inputs = {"pixel_values": noise(5, 3, *vision.image_size)}
    else:
        side = vision.image_size
        inputs = {"pixel_values": noise(1, 3, side, side)}
        if kind != "llava":  # a square image of two tiles a side, and the base view
            inputs = {
                "pixel_values": noise(1, 5, 3, side, side),
                "image_sizes": torch.tensor([[2 * side, 2 * side]], device=device),
            }
    with torch.no_grad():
        count = sum(len(part) for part in model.base_model.get_image_features(**inputs).pooler_output)
    words = torch.randint(3, min(30000, config.image_token_id), (TEXT_TOKENS,), generator=generator)
    ids = torch.cat([words[:4], torch.full((count,), config.image_token_id), words[4:]])[None].to(device)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


# --- measuring


@dataclass
class Row:
    """One line of the table. Milliseconds; flops and bytes are counted from the config.

    prune: everything that pruning adds; select: the ops alone, a part of prune.
    """

    preset: str
    keep: str
    visual: int
    prompt: int
    tower_ms: float
    projector_ms: float
    select_ms: float
    prune_ms: float
    llm_ms: float
    first_token_ms: float
    gflops: float
    kv_mib: float
    peak_mib: float | None
    llm_speedup: float
    total_speedup: float
    rounds: int


TIMES = ("tower_ms", "projector_ms", "select_ms", "prune_ms", "llm_ms", "first_token_ms")


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


@contextmanager
def projector_time(model: transformers.PreTrainedModel, device: torch.device) -> Iterator[list[float]]:
    """Milliseconds spent in the projector (Qwen: the patch merger) during the block, appended call by call."""
    base = model.base_model
    projector = getattr(base, "multi_modal_projector", None) or base.visual.merger
    spent: list[float] = []
    hooks = [
        projector.register_forward_pre_hook(lambda *_: spent.append(-clock(device))),
        projector.register_forward_hook(lambda *_: spent.append(spent.pop() + clock(device))),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_once(model: transformers.PreTrainedModel, inputs: dict[str, Any], keep: int | None) -> dict[str, float]:
    """The milliseconds of one prefill, by TIMES."""
    device = inputs["input_ids"].device
    with projector_time(model, device) as projector:
        start = clock(device)
        select = prune = 0.0
        if keep is None:
            pixels = ("pixel_values", "image_sizes", "image_grid_thw")
            features = model.base_model.get_image_features(**{k: inputs[k] for k in pixels if k in inputs})
            vision = clock(device) - start
            prefill = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_sizes")}
            prefill["mm_encoder_outputs"] = {"image": features}
        else:
            pruned = prune_inputs(model, inputs, keep)
            vision, prune, select = pruned.stats.vision_ms, pruned.stats.prune_ms, pruned.stats.select_ms
            prefill = dict(pruned.items())
        before = clock(device)
        logits = model(**prefill, use_cache=True, logits_to_keep=1).logits
        logits[:, -1].argmax(-1)
        end = clock(device)
    spent = sum(projector)
    return dict(zip(TIMES, (vision - spent, spent, select, prune, end - before, end - start), strict=True))


def measure_peak(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB at the call's highest moment: allocated on the GPU, or resident in this process (weights included)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
    except OSError:
        return None
    call()
    return memory.status("VmHWM") / 2**20


def measure(
    name: str, config: Any, keeps: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int
) -> list[Row]:
    model = make_model(config, dtype, device)
    inputs = make_inputs(model)
    visual = int((inputs["input_ids"] == config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - visual
    variants: list[int | None] = [None, *(keep for keep in keeps if keep < visual)]
    for keep in variants * 2:
        run_once(model, inputs, keep)
    runs: dict[int | None, list[dict[str, float]]] = {keep: [] for keep in variants}
    for _ in range(rounds):
        for keep in variants:
            runs[keep].append(run_once(model, inputs, keep))
    rows: list[Row] = []
    full: dict[str, float] = {}
    for keep in variants:
        part = {name: statistics.median(run[name] for run in runs[keep]) for name in TIMES}
        full = full or part
        kept = visual if keep is None else keep
        prompt = text + kept
        row = Row(
            preset=name,
            keep="all" if keep is None else str(keep),
            visual=kept,
            prompt=prompt,
            **part,
            gflops=(prefill_flops(config, prompt) or float("nan")) / 1e9,
            kv_mib=kv_cache_bytes(config, prompt, dtype) / 2**20,
            peak_mib=measure_peak(lambda keep=keep: run_once(model, inputs, keep), device),  # type: ignore[misc]
            llm_speedup=full["llm_ms"] / (part["llm_ms"] + part["prune_ms"]),
            total_speedup=full["first_token_ms"] / part["first_token_ms"],
            rounds=rounds,
        )
        rows.append(row)
    return rows


# --- reporting


def table(rows: list[Row]) -> str:
    header = ["preset", "keep", "prompt", "tower ms", "projector", "select", "prune", "LLM", "first token"]
    header += ["GFLOP", "KV MiB", "peak MiB", "LLM x", "total x"]
    lines = []
    for row in rows:
        cells = [row.preset, row.keep, str(row.prompt), *(f"{getattr(row, name):.2f}" for name in TIMES)]
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        cells += [f"{row.gflops:.0f}", f"{row.kv_mib:.1f}", peak, f"{row.llm_speedup:.2f}", f"{row.total_speedup:.2f}"]
        lines.append(cells)
    return report.layout(header, lines)


def targets(preset: Preset, rows: list[Row]) -> list[Target]:
    full, last = rows[0], rows[-1]
    at = f"{last.preset}, {full.visual} -> {last.visual}: "
    found = []
    if preset.speedup:
        found.append(Target(at + "LLM prefill, pruning included, x faster", preset.speedup, last.llm_speedup))
    if preset.flops:
        found.append(Target(at + "prefill FLOPs, x fewer", preset.flops, full.gflops / last.gflops))
    if preset.share:
        percent = 100 * last.prune_ms / full.llm_ms
        found.append(Target(at + "pruning, % of the unpruned prefill", 100 * preset.share, percent, at_most=True))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench prefill", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), help="default: all that run here")
    parser.add_argument("--config", type=pathlib.Path, help="folder of a supported model's config.json")
    parser.add_argument("--keep", type=int, action="append", help="with --config: tokens to keep, may be repeated")
    parser.add_argument("--device", type=torch.device, help="for --config; presets choose theirs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder of the CSV")
    options = parser.parse_args(arguments)
    if options.config and options.preset:
        parser.error("--config and --preset exclude each other")

    cuda = torch.cuda.is_available()
    jobs: dict[str, tuple[Any, tuple[int, ...], torch.dtype, torch.device]] = {}
    if options.config:
        device = options.device or torch.device("cuda" if cuda else "cpu")
        config = transformers.AutoConfig.from_pretrained(options.config, local_files_only=True)
        dtype = BF16 if device.type == "cuda" else FP32
        jobs[options.config.name] = (config, tuple(options.keep or (64,)), dtype, device)
    for name in () if options.config else options.preset or PRESETS:
        preset = PRESETS[name]
        if preset.gpu and not cuda:
            print(f"{name}: skipped, needs a CUDA device and torch {torch.__version__} sees none")
            continue
        jobs[name] = (preset.config(), preset.keeps, preset.dtype, torch.device("cuda" if preset.gpu else "cpu"))

    for name, (config, keeps, dtype, device) in jobs.items():
        facts = report.environment(device) | {
            "transformers": transformers.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": str(torch.get_num_threads()),
        }
        print("  ".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
        rows = measure(name, config, keeps, dtype, device, options.rounds)
        print(table(rows))
        if name in PRESETS and targets(PRESETS[name], rows):
            print("\n" + report.target_table(targets(PRESETS[name], rows)))
        path = options.out / f"prefill-{name}.csv"
        header = [field.name for field in fields(Row)]
        report.write_rows(header, (asdict(row).values() for row in rows), facts, path)
        print(f"\nwritten: {path}\n", flush=True)
    return 0
