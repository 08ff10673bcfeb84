"""Tiny random vision-language models and processor-like inputs, for tests: no downloads.

A prompt is a list of parts: an int (that many random words), an `Image` or a `Video`. `make_inputs` returns what the
model's processor would: left-padded ids with one placeholder per visual token, mask, pixels and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

transformers = pytest.importorskip("transformers")

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 190, 191, 192, 193
WORDS = range(10, 180)
IMAGE_FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl")
MARKED = ("internvl", "qwen2_5_vl", "qwen3_vl")  # these put an id before and after each run of placeholders
VIDEO_FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Image:
    """size: (height, width) in pixels for any-resolution models, tiles for InternVL, patches for Qwen."""

    height: int = 2
    width: int = 2


@dataclass(frozen=True)
class Video:
    frames: int = 3
    height: int = 4
    width: int = 6


# An image and a larger one, in each family's own measure.
SIZES = {
    "llava": (Image(), Image()),
    "llava_next": (Image(100, 90), Image(40, 100)),
    "llava_onevision": (Image(110, 100), Image(30, 100)),
    "internvl": (Image(1, 2), Image(1, 3)),
    "qwen2_5_vl": (Image(8, 12), Image(12, 12)),
    "qwen3_vl": (Image(8, 12), Image(12, 12)),
}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
}
_ANYRES = [[56, 112], [112, 56], [112, 112], [56, 168]]
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def make_config(family: str):
    clip = transformers.CLIPVisionConfig(**_VISION, image_size=84 if family == "llava" else 56, patch_size=14)
    if family == "llava":
        return transformers.LlavaConfig(
            vision_config=clip, text_config=transformers.LlamaConfig(**_TEXT), image_token_index=IMAGE
        )
    if family == "llava_next":
        return transformers.LlavaNextConfig(
            vision_config=clip,
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=_ANYRES,
        )
    if family == "llava_onevision":
        siglip = transformers.SiglipVisionConfig(**_VISION, image_size=56, patch_size=14, vision_use_head=False)
        return transformers.LlavaOnevisionConfig(
            vision_config=siglip,
            text_config=transformers.Qwen2Config(**_TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_ANYRES,
            vision_aspect_ratio="anyres_max_2",  # small enough that four tiles are resized
        )
    if family == "internvl":
        vision = transformers.InternVLVisionConfig(**_VISION, image_size=(112, 112), patch_size=(14, 14))
        text = transformers.Qwen2Config(**_TEXT)
        return transformers.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False
        )
    text = dict(_TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
        "initializer_range": 0.15,
    }  # fmt: skip
    if family == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        return transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return transformers.Qwen3VLConfig(vision_config=vision, text_config=text | {"head_dim": 16}, **_QWEN_IDS)


_CLASSES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
    "internvl": transformers.InternVLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


@cache
def make_model(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    torch.manual_seed(7)
    config = make_config(family)
    config._attn_implementation = attention
    model = _CLASSES[family](config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # every answer has the length that was asked for
    model.generation_config.pad_token_id = PAD
    return model


def _pixels(family: str, model, visuals: list, dtype: torch.dtype, generator: torch.Generator) -> dict:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    config = model.config
    images = [v for v in visuals if isinstance(v, Image)]
    videos = [v for v in visuals if isinstance(v, Video)]
    inputs: dict = {}
    if family == "llava":
        inputs["pixel_values"] = noise(len(images), 3, 84, 84)
    elif family == "internvl":
        inputs["pixel_values"] = noise(sum(i.height * i.width for i in images), 3, 112, 112)
    elif family in ("llava_next", "llava_onevision"):
        if images:
            inputs["pixel_values"] = noise(len(images), 5, 3, 56, 56)
            inputs["image_sizes"] = torch.tensor([[i.height, i.width] for i in images])
        if videos:
            inputs["pixel_values_videos"] = noise(len(videos), videos[0].frames, 3, 56, 56)
    else:
        depth = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        for modality, items in (("image", images), ("video", videos)):
            if items:
                grid = torch.tensor([[getattr(i, "frames", 1), i.height, i.width] for i in items])
                key = "pixel_values" if modality == "image" else "pixel_values_videos"
                inputs[key] = noise(int(grid.prod(1).sum()), depth)
                inputs[f"{modality}_grid_thw"] = grid
    return inputs


def _length(family: str, model, part) -> list[int]:
    """Placeholders of one visual: one run, or one per frame where the prompt marks each frame's time."""
    if family.startswith("qwen"):
        per_frame = part.height * part.width // 4
        frames = getattr(part, "frames", 1)
        return [per_frame] * frames if family == "qwen3_vl" else [per_frame * frames]
    alone = _pixels(family, model, [part], model.dtype, torch.Generator().manual_seed(0))
    with torch.no_grad():
        if isinstance(part, Video):
            return [model.model.get_video_features(alone["pixel_values_videos"]).pooler_output.shape[1]]
        pooled = model.model.get_image_features(**alone).pooler_output
    return [sum(len(p) for p in pooled)]


def make_inputs(family: str, prompts: list[list], *, dtype: torch.dtype = torch.float32, seed: int = 0, pad="left"):
    model = make_model(family, dtype)
    generator = torch.Generator().manual_seed(seed)
    rows, counts = [], []
    for parts in prompts:
        ids = [BOS]
        counts.append(sum(isinstance(p, Image) for p in parts))
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(WORDS.start, WORDS.stop, (part,), generator=generator).tolist()
                continue
            token = IMAGE if isinstance(part, Image) else VIDEO
            lengths = _length(family, model, part)
            if family == "llava_onevision" and isinstance(part, Image) and counts[-1] > 1:
                lengths = [17]  # of several images each gets one view and a newline
            for length in lengths:
                run = [token] * length
                ids += [VISION_START, *run, VISION_END] if family in MARKED else run
        rows.append(ids)
    width = max(map(len, rows))
    gap = [[PAD] * (width - len(r)) for r in rows]
    ones = [[1] * len(r) for r in rows]
    zeros = [[0] * len(g) for g in gap]
    left = pad == "left"
    inputs = {
        "input_ids": torch.tensor([g + r if left else r + g for r, g in zip(rows, gap, strict=True)]),
        "attention_mask": torch.tensor([z + o if left else o + z for o, z in zip(ones, zeros, strict=True)]),
    }
    visuals = [p for parts in prompts for p in parts if not isinstance(p, int)]
    inputs |= _pixels(family, model, visuals, dtype, generator)
    if family == "llava_onevision" and "pixel_values" in inputs:
        inputs["batch_num_images"] = [c for c in counts if c]
    if family.startswith("qwen"):
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if family == "qwen2_5_vl" and "video_grid_thw" in inputs:
            inputs["second_per_grid_ts"] = [0.5] * len(inputs["video_grid_thw"])
    return model, inputs
