"""A real model's tokens and words for the demo."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import MROPE, check_model, encode


class DemoFeatures(NamedTuple):
    """tokens (rows * columns, D) of one view of the picture, row by row; query (Q, D), the words' embeddings.

    picture: the part of the image that the tokens cover (PIL).
    """

    tokens: Tensor
    query: Tensor
    rows: int
    columns: int
    picture: Any


def demo_features(model_path: str, image: Any, text: str) -> DemoFeatures:
    """Projected visual features of `image` (PIL) and input embeddings of `text`, from a supported model.

    model_path: a folder, or an id on the Hugging Face hub (which downloads it). Any-resolution models give their view
    of the whole picture. LLaVA-1.5 sees a square, so its picture is the image's middle square.

    Raises:
        TypeError: a model that is not supported. ValueError: a text without words. OSError: no such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_path).eval()
    kind = check_model(model)
    processor = AutoProcessor.from_pretrained(model_path)
    image = image.convert("RGB")
    if kind == "llava":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    words = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
    if words.shape[1] == 0:
        raise ValueError(f"text: expected at least one word, got {text!r}")
    placeholder = getattr(processor, "image_token", "<image>")
    if kind in MROPE:
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    inputs = processor(images=image, text=f"{placeholder}\n{text}", return_tensors="pt")
    with torch.no_grad():
        (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
        query = model.get_input_embeddings()(words[0])
    tokens = visual.features
    if kind in MROPE:
        merge = model.config.vision_config.spatial_merge_size
        rows, columns = (int(n) // merge for n in inputs["image_grid_thw"][0, 1:])
    else:
        # The base view comes first, InternVL's thumbnail of the whole picture last.
        view = int(visual.tile.max()) if kind == "internvl" else 0
        tokens = tokens[(visual.tile == view) & ~visual.newline]
        rows = columns = round(len(tokens) ** 0.5)
    return DemoFeatures(tokens, query.to(tokens.dtype), rows, columns, image)
