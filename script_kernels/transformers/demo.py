"""A real model's tokens and words for the demo."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode import encode
from .families import family_of


class DemoFeatures(NamedTuple):
    """tokens (grid * grid, D) of one view of the picture, row by row; query (Q, D), the words' embeddings.

    picture: the image's middle square, which the tokens cover (PIL).
    """

    tokens: Tensor
    query: Tensor
    picture: Any


def demo_features(model_path: str, image: Any, text: str) -> DemoFeatures:
    """Projected visual features of `image` (PIL) and input embeddings of `text`, from a supported model.

    model_path: a folder, or an id on the Hugging Face hub (which downloads it). The model gets the image's middle
    square; of a model that also cuts it into tiles, the tokens are those of the view of the whole.

    Raises:
        TypeError: a model that is not supported. ValueError: a text without words. OSError: no such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_path).eval()
    family = family_of(model)
    processor = AutoProcessor.from_pretrained(model_path)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    words = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
    if words.shape[1] == 0:
        raise ValueError(f"text: expected at least one word, got {text!r}")
    placeholder = getattr(processor, "image_token", "<image>")
    if family.has_mrope(model):
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    inputs = processor(images=image, text=f"{placeholder}\n{text}", return_tensors="pt")
    with torch.no_grad():
        (visual,), *_ = encode(model, inputs, inputs["input_ids"], inputs["attention_mask"])
        query = model.get_input_embeddings()(words[0])
    tokens = visual.features
    if not family.has_mrope(model):
        # The base view comes first, InternVL's thumbnail of the whole picture last.
        view = int(visual.tile.max()) if model.config.model_type == "internvl" else 0
        tokens = tokens[(visual.tile == view) & ~visual.newline]
    return DemoFeatures(tokens, query.to(tokens.dtype), image)
