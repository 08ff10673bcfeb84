"""One `Family` per shape of model: where its features come from, how they are split, what goes along with its tokens.

All that pruning knows of a model's type stands here. A type that is not named gets `PLAIN`, and has to prove on its
first inputs that it fits (see `selfcheck`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import layouts
from .layouts import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inputs with one entry per token, and what stands on padding.
ALONG = {"token_type_ids": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0, "labels": -100}


@dataclass(frozen=True)
class Family:
    """How the models of one shape are pruned; most need nothing but a name.

    name: for messages. adapter: see `layouts`; the default takes one image per entry of a list `pooler_output`, or per
    unbroken run of placeholders of a tensor. pixels: the input that holds each modality's pixels, images first.
    along: which of the inputs of `ALONG` the pruned call gets; None: all that the model's forward takes.
    mrope: positions have three axes, from the model's own get_rope_index; None: whether it has one.
    marked: the prompt has an id before and after each image that no config names.
    as_images: a video's placeholders are the image's id, and mm_token_type_ids has a 2 there.
    proven: tests hold that keep = all equals the unpruned model; otherwise the first call of each model checks it.
    """

    name: str
    adapter: Adapter = layouts.pieces
    pixels: Mapping[str, str] = field(default_factory=lambda: {"image": "pixel_values", "video": "pixel_values_videos"})
    along: tuple[str, ...] | None = None
    mrope: bool | None = None
    marked: bool = False
    as_images: bool = False
    proven: bool = False

    def has_mrope(self, model: PreTrainedModel) -> bool:
        return hasattr(model.base_model, "get_rope_index") if self.mrope is None else self.mrope


IMAGE = {"image": "pixel_values"}
PLAIN = Family("a model that takes mm_encoder_outputs")


def _image(name: str, adapter: Adapter = layouts.pieces, **others: Any) -> Family:
    return Family(name, adapter, IMAGE, proven=True, **others)


def _both(name: str, adapter: Adapter = layouts.pieces, **others: Any) -> Family:
    return Family(name, adapter, proven=True, **others)


FAMILIES: dict[str, Family] = {
    "llava": _image("LLaVA-1.5", layouts.entries),
    "llava_next": _image("LLaVA-NeXT", layouts.llava_next),
    "llava_next_video": _both("LLaVA-NeXT-Video", layouts.llava_next),
    "granite4_vision": _image("Granite 4 Vision", layouts.granite4_vision),
    "llava_onevision": _both("LLaVA-OneVision", layouts.llava_onevision),
    "idefics3": _image("Idefics3", layouts.prompts),
    "smolvlm": _image("SmolVLM", layouts.prompts),
    "internvl": _image("InternVL", marked=True),
    "qwen2_5_vl": _both("Qwen2.5-VL", layouts.qwen, along=("labels",)),
    "qwen3_vl": _both("Qwen3-VL", layouts.qwen, along=("labels",)),
} | {kind: Family("GLM-V", as_images=True) for kind in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga")}
# Types that cannot be pruned by this route, and why.
_CROSS = "its language model reads images by cross-attention, so that no token of the prompt stands for a part of them"
_PIXELS = "its forward takes no features from outside"
_OWN_GENERATE = "its generate takes pixels alone and encodes them itself, so that pruned features never reach it"
_THINKER = "it holds several models, of which the one that sees is model.thinker; give that one"
REFUSED: dict[str, str] = {
    "blip": _CROSS,
    "blip-2": _OWN_GENERATE,
    "evolla": _PIXELS,
    "florence2": "its encoder and decoder take the image's features and the text as one, with no placeholders to drop",
    "fuyu": "its features are its encoder's last_hidden_state, with no pooler_output that pruning could replace",
    "git": _PIXELS,
    "idefics": _CROSS,
    "instructblip": _OWN_GENERATE,
    "instructblipvideo": _OWN_GENERATE,
    "kosmos-2": _PIXELS,
    "kosmos-2.5": _PIXELS,
    "llama4": "its forward projects last_hidden_state itself, and reads no features that fit the placeholders",
    "mistral4": "it takes no pictures",
    "mllama": _CROSS,
    "phi4_multimodal": _PIXELS,
    "pi0": _PIXELS,
    "pix2struct": _CROSS,
    "pp_formulanet": _PIXELS,
    "qwen2_5_omni": _THINKER,
    "qwen3_omni_moe": _THINKER,
    "t5gemma2": _PIXELS,
    "udop": _PIXELS,
    "vision-encoder-decoder": _PIXELS,
}


def register_family(model_type: str, family: Family) -> None:
    """Says how models of a type are pruned; replaces what was known of it.

    Raises:
        TypeError: a type that is no str, a family that is no `Family`.

    >>> register_family("my_vlm", Family("My VLM", pixels={"image": "pixel_values"}, marked=True))
    """
    if not isinstance(model_type, str):
        raise TypeError(f"model_type: expected a str, got {type(model_type).__name__}")
    if not isinstance(family, Family):
        raise TypeError(f"family: expected a Family, got {type(family).__name__}")
    REFUSED.pop(model_type, None)
    FAMILIES[model_type] = family


# By function: a bound method's would be lost with it, and kept, it would hold the model.
_parameters: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a function's or method's parameters; inspecting them takes a hundred times as long as this."""
    key = getattr(function, "__func__", function)
    if key not in _parameters:
        _parameters[key] = tuple(inspect.signature(key).parameters)
    return _parameters[key]


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT, torch.compile, DataParallel and a pipeline, whose weights they share."""
    seen: list[Any] = []
    while not any(model is one for one in seen):
        seen.append(model)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, torch.nn.Module):
            inner = model._modules.get("_orig_mod") or model._modules.get("module")
            model = model if inner is None else inner
        elif isinstance(getattr(model, "model", None), torch.nn.Module):
            model = model.model
    return model


def family_of(model: Any) -> Family:
    """The family of an unwrapped model, or an error that says why it has none."""
    import transformers

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model: expected a transformers model such as {known}, got {type(model).__name__}")
    got = f"got {type(model).__name__} with model_type {model_type!r}"
    if model_type in REFUSED:
        raise TypeError(f"model: expected one whose visual tokens can be pruned, {got}: {REFUSED[model_type]}")
    if "mm_encoder_outputs" not in parameters(type(model).forward):
        if model_type in FAMILIES:
            raise RuntimeError(
                f"transformers: expected version >= 5.18 (mm_encoder_outputs), got {transformers.__version__}"
            )
        raise TypeError(
            f"model: expected one of {known} or another that takes mm_encoder_outputs, {got}, whose forward takes no "
            "features from outside"
        )
    if model_type not in FAMILIES and not hasattr(model.base_model, "get_image_features"):
        raise TypeError(
            f"model: expected one whose get_image_features returns the visual tokens, {got}; "
            "script_kernels.transformers.register_family tells how else to find them"
        )
    return FAMILIES.get(str(model_type), PLAIN)


def text_config(model: PreTrainedModel) -> Any:
    """The language model's config; most call it text_config, and `get_text_config` takes longer to find it."""
    return getattr(model.config, "text_config", None) or model.config.get_text_config()


def token_id(model: PreTrainedModel, modality: str) -> int | None:
    """The placeholder's id, or None where the model has none for this modality."""
    names = (f"{modality}_token_id", f"{modality}_token_index")
    return next((i for i in (getattr(model.config, name, None) for name in names) if i is not None), None)
