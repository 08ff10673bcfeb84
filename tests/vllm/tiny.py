"""Tiny random models of each family with processor and tokenizer, saved as vLLM loads them: no downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

FAMILIES = ("llava", "llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<unk>"]
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
WORDS = [f"w{i}" for i in range(180)]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ c.text if c.type == 'text' else IMAGE }} {% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]


def make_tokenizer(image: str) -> transformers.PreTrainedTokenizerFast:
    words = {token: i for i, token in enumerate([*SPECIAL, "USER:", "ASSISTANT:", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>", "<|vision_start|>", "<|vision_end|>"],
        chat_template=TEMPLATE.replace("IMAGE", repr(image)),
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<image>",
        },
    )


def placeholder(family: str) -> str:
    return "<|vision_start|> <image> <|vision_end|>" if family.startswith("qwen") else "<image>"


def _clip(size: int) -> dict[str, object]:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}


def make_model(family: str) -> tuple[torch.nn.Module, object]:
    """The model and its processor. `scale`: logits far from uniform show errors that uniform ones hide."""
    tokenizer = make_tokenizer(placeholder(family))
    torch.manual_seed(7)
    if family in ("llava", "llava_next"):
        size = 84 if family == "llava" else 56
        vision = transformers.CLIPVisionConfig(**_VISION, image_size=size, patch_size=14)
        shared = {"vision_config": vision, "text_config": transformers.LlamaConfig(**_TEXT), "image_token_index": IMAGE}
        common = {"tokenizer": tokenizer, "patch_size": 14, "num_additional_image_tokens": 1}
        common |= {"vision_feature_select_strategy": "default", "chat_template": tokenizer.chat_template}
        if family == "llava":
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**shared))
            images = transformers.CLIPImageProcessor(**_clip(size))
            return model, transformers.LlavaProcessor(image_processor=images, **common)
        config = transformers.LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
        images = transformers.LlavaNextImageProcessor(**_clip(size), image_grid_pinpoints=PINPOINTS)
        model = transformers.LlavaNextForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.image_newline, std=0.5)
        return model, transformers.LlavaNextProcessor(image_processor=images, **common)
    if family == "internvl":
        vision = transformers.InternVLVisionConfig(**_VISION, image_size=(112, 112), patch_size=(14, 14))
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**_TEXT), image_token_id=IMAGE
        )
        images = transformers.GotOcr2ImageProcessor(
            size={"height": 112, "width": 112}, crop_to_patches=True, min_patches=1, max_patches=4
        )
        video = transformers.InternVLVideoProcessor(size={"height": 112, "width": 112})
        processor = transformers.InternVLProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=video,
            image_seq_length=16,
            chat_template=tokenizer.chat_template,
        )
        return transformers.InternVLForConditionalGeneration(config), processor
    text = dict(_TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]})
    vision = {"depth": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "initializer_range": 0.15}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2}
        name = "Qwen2VL"
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
        if family == "qwen2_5_vl":
            vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
            name = "Qwen2_5_VL"
        else:
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            # transformers interleaves the axes of Qwen3-VL whatever the config says; vLLM where it says so.
            rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
            text |= {"head_dim": 32, "rope_parameters": {**text["rope_parameters"], **rope}}
            name = "Qwen3VL"
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **_QWEN)
    pixels = {"min_pixels": 64, "max_pixels": 4096, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = transformers.Qwen2VLImageProcessor(**pixels)
    videos = transformers.Qwen3VLVideoProcessor if family == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos(patch_size=4, merge_size=2, temporal_patch_size=2),
        chat_template=tokenizer.chat_template,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the family's model for vLLM; the same weights each time."""
    model, processor = make_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return write(model.to(dtype), processor, folder)


def write(model: torch.nn.Module, processor: object, folder: Path) -> Path:
    model.config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if model.config.model_type in ("llava", "llava_next"):  # by transformers without the level that vLLM 0.32 reads
        weights = load_file(folder / "model.safetensors")
        old, new = "vision_tower.", "vision_tower.vision_model."
        renamed = {k if new in k else k.replace(old, new): v for k, v in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse random blocks with noise: alike within a block, as images are."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (3, 4, 3))
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    pixels = blocks[rows][:, columns] + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def question(family: str, images: int, seed: int, words: int = 6) -> str:
    generator = np.random.default_rng(seed)
    text = " ".join(generator.choice(WORDS, words))
    return f"<s> USER: {' '.join([placeholder(family)] * images)} {text} ASSISTANT:"
