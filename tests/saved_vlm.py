"""A tiny random LLaVA in a folder, with a processor that reads pictures and words: what from_pretrained loads."""

from __future__ import annotations

import pathlib

import pytest
import torch
from tiny_vlm import IMAGE, make_model, transformers

WORDS = ["<unk>", "</s>", "USER", "ASSISTANT", ":", "what", "colour", "is", "the", "car", "?"]
TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def save_llava(folder: pathlib.Path) -> pathlib.Path:
    """Saves model and processor as save_pretrained leaves them. Every id has a word, so that answers can be read."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("PIL")
    model = make_model("llava")
    model.save_pretrained(folder)
    vocabulary = {word: 10 + i for i, word in enumerate(WORDS)} | {"<image>": IMAGE}
    free = set(range(model.config.text_config.vocab_size)) - set(vocabulary.values())
    vocabulary |= {f"word{i}": i for i in free}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 84, "width": 84}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=size)
    processor = transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def photo(width: int, height: int, seed: int = 0):
    from PIL import Image

    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
