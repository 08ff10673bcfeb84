"""Tiny random models of many image-text-to-text types of transformers, from their configs alone: no downloads.

`make_model` shrinks a type's default config by the names of its sizes; `make_inputs` shows one image per prompt. What a
type wants besides stands in `EXTRA` and `INPUTS`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES  # noqa: E402

IMAGE, VIDEO, START, END = 190, 191, 192, 193
SIZES: dict[str, Any] = {}
for names, size in (
    ("hidden_size embed_dim d_model n_embd dim width projection_dim hidden_dim out_hidden_size projector_hidden_size "
     "mm_hidden_size text_hidden_size vision_hidden_size projection_size aligner_projection_size", 64),
    ("intermediate_size ffn_dim mlp_dim projector_intermediate_size shared_expert_intermediate_size "
     "dense_intermediate_size intermediate_size_mlp feed_forward_length", 96),
    ("num_hidden_layers num_layers n_layer", 3),
    ("depth encoder_layers decoder_layers vision_layers", 3),
    ("num_attention_heads num_heads encoder_attention_heads decoder_attention_heads n_head attention_heads "
     "linear_num_value_heads", 4),
    ("num_key_value_heads linear_num_key_heads", 2),
    ("head_dim linear_key_head_dim linear_value_head_dim global_head_dim", 16),
    ("vocab_size", 200),
    ("image_size", 56),
    ("patch_size", 14),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    ("num_experts_per_tok moe_topk moe_k top_k_experts", 2),
    ("moe_intermediate_size expert_ffn_hidden_size", 32),
    ("n_group topk_group first_k_dense_replace n_shared_experts moe_num_shared_experts", 1),
    ("q_lora_rank kv_lora_rank", 32),
    ("qk_nope_head_dim qk_rope_head_dim v_head_dim", 16),
    ("max_position_embeddings", 4096),
    ("initializer_range", 0.15),
    ("image_token_id image_token_index img_token_id", IMAGE),
    ("video_token_id video_token_index", VIDEO),
    ("vision_start_token_id image_start_token_id boi_token_id", START),
    ("vision_end_token_id image_end_token_id eoi_token_id", END),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
    ("pad_token_id", 0),
):  # fmt: skip
    SIZES |= dict.fromkeys(names.split(), size)
DROPPED = {
    "layer_types",
    "per_layer_config",
    "mlp_layer_types",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "architectures",
}


def shrink(config: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """The config as a dict of small sizes; extra: dotted names and their values, None to leave one out."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(name, str) or name in DROPPED:
            continue
        if isinstance(value, dict):
            small[name] = shrink(
                value, {k.removeprefix(f"{name}."): v for k, v in extra.items() if k.startswith(f"{name}.")}
            )
        elif name in SIZES and value is not None and not isinstance(value, (list, tuple)):
            small[name] = SIZES[name]
        elif name == "mrope_section" and value:
            small[name] = [2, 3, 3]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 200:
            small[name] = 194
        else:
            small[name] = value
    return small | {k: v for k, v in extra.items() if "." not in k}


ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
HYBRID = {"text_config.layer_types": ["linear_attention", "linear_attention", "full_attention"]}
DEEP = {"vision_config.deepstack_visual_indexes": [0, 1]}
ANYRES = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
POOLED = {"mm_tokens_per_image": 16, "vision_config.image_size": 112}
GEMMA4 = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 4, "patch_size": 14, "position_embedding_size": 64, "initializer_range": 0.15},
}
TIMM = {"model_type": "timm_wrapper", "initializer_range": 0.15}
# The encoder's merger stands behind its second layer.
MINICPM = HYBRID | {"image_token_id": IMAGE, "video_token_id": VIDEO}
MERGED = MINICPM | {"insert_layer_id": 1, "vision_config.insert_layer_id": 1}
OMNI = MROPE | {"vision_start_token_id": START, "audio_start_token_id": 195}
EXTRA: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "text_config.rope_parameters": dict.fromkeys(
            ("sliding_attention", "full_attention"), ROPE | {"mrope_section": [2, 3, 3]}
        ),
    },
    "cosmos3_omni": DEEP,
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": ROPE | {"mrope_section": [3, 3, 2]},
        "text_config.moe_intermediate_size": [32, 32],
    },
    "fast_vlm": {
        "image_token_index": IMAGE,
        "vision_config": TIMM
        | {
            **{"architecture": "fastvit_mci0", "hidden_size": 64, "do_pooling": True, "global_pool": "avg"},
            "model_args": {
                **{"inference_mode": True, "layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "cls_ratio": 2.0},
            },
        },
    },
    "gemma3": POOLED,
    "gemma3n": {
        "vision_soft_tokens_per_image": 16,
        "vision_config": {
            **{"model_type": "gemma3n_vision", "architecture": "mobilenetv3_small_050", "hidden_size": 288},
            **{"do_pooling": False, "vocab_offset": IMAGE, "vocab_size": 6},
        },
        "audio_config": {
            **{"model_type": "gemma3n_audio", "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4},
            **{"hidden_size": 64, "sscp_conv_channel_size": (8, 8), "input_feat_size": 16},
            **{"vocab_offset": IMAGE + 6, "vocab_size": 4},
        },
        "text_config.activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "text_config.num_kv_shared_layers": 1,
        "text_config.intermediate_size": 96,
        "text_config.vocab_size_per_layer_input": 200,
        "text_config.hidden_size_per_layer_input": 16,
        "text_config.laurel_rank": 8,
    },
    "gemma4": {
        "vision_config": {**GEMMA4, "model_type": "gemma4_vision"},
        "text_config.vocab_size_per_layer_input": 200,
        "text_config.hidden_size_per_layer_input": 16,
    },
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": {"text_config.rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm_ocr": MROPE,
    "glmga": MROPE,
    "granite4_vision": ANYRES
    | {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [2],
    },
    "got_ocr2": {"vision_config.image_size": 224},
    "janus": {
        "vq_config.num_embeddings": 16,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_patches": 4,
    },
    "kimi_k25": {"projection_hidden_size": 64, "text_config.num_key_value_heads": 4},
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MERGED,
    "minicpmv4_7": MERGED,
    "llava_next": ANYRES,
    "llava_next_video": ANYRES,
    "llava_onevision": ANYRES,
    "paddleocr_vl": MROPE,
    "perception_lm": {
        "vision_config": TIMM
        | {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {
                **{"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": (64, 64)},
                **{"use_post_transformer_norm": False, "global_pool": ""},
            },
        },
    },
    "pp_chart2table": {"vision_config.image_size": 224},
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID,
    "qwen3_omni_moe_thinker": OMNI | DEEP,
    "qwen3_vl": DEEP,
    "qwen3_vl_moe": DEEP,
    "qwen4_exp": HYBRID,
    "shieldgemma2": POOLED,
    "step3p7": {"text_config.sliding_window": 4096, "vision_config.image_size": 224},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}


def make_config(kind: str) -> Any:
    default = CONFIG_MAPPING[kind]()
    return type(default).from_dict(shrink(default.to_dict(), EXTRA.get(kind, {})))


def make_model(kind: str) -> Any:
    name = TYPES[kind]
    torch.manual_seed(7)
    config = make_config(kind)
    config._attn_implementation = "eager"
    model = getattr(transformers, name if isinstance(name, str) else name[0])(config).float().eval()
    # Latents that begin as ones and projections as zeros would make all rows of an image alike.
    for parameter in model.parameters():
        if parameter.ndim > 1 and bool((parameter == parameter.flatten()[0]).all()):
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def vision_of(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def square(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    side = getattr(vision_of(model.config), "image_size", 56)
    side = side if isinstance(side, int) else side[0]
    return {"pixel_values": noise(count, 3, side, side)}


def patches(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    vision = vision_of(model.config)
    depth = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {"pixel_values": noise(count * 96, depth), "image_grid_thw": torch.tensor([[1, 8, 12]] * count)}


def sized(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return square(model, count, noise) | {"image_sizes": torch.tensor([[56, 56]] * count)}


def crops(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    pixels = square(model, count, noise)["pixel_values"][:, None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(count, 1, *pixels.shape[-2:], dtype=torch.bool)}


KINDS = (square, patches, sized, crops)


def anyres(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {"pixel_values": noise(count, 3, 3, 56, 56), "image_sizes": torch.tensor([[100, 50]] * count)}


def naflex(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    depth = 3 * model.config.vision_config.patch_size**2
    mask = torch.ones(count, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4]] * count)
    return {"pixel_values": noise(count, 16, depth), "spatial_shapes": shapes, "pixel_attention_mask": mask}


def merged(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return patches(model, count, noise) | {"image_merge_sizes": torch.tensor([2] * count)}


def doubled(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    depth = 2 * 3 * model.config.vision_config.patch_size**2
    return {"pixel_values": noise(count * 96, depth), "image_grid_thw": torch.tensor([[1, 8, 12]] * count)}


def unfolded(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    side = model.config.vision_config.patch_size
    return {"pixel_values": noise(count * 96, 3, side, side), "image_grid_thw": torch.tensor([[1, 8, 12]] * count)}


def placed(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Patches with their (x, y)."""
    side = model.config.vision_config.patch_size
    grid = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    return {"pixel_values": noise(count, 144, 3 * side**2).sigmoid(), "image_position_ids": grid.expand(count, 144, 2)}


def hybrid(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    side = model.config.high_res_vision_config.image_size
    return square(model, count, noise) | {"high_res_pixel_values": noise(count, 3, side, side)}


def timm(*shape: int) -> Callable[..., dict[str, Any]]:
    """An encoder whose config does not say how large its images are."""
    return lambda model, count, noise: {"pixel_values": noise(count, *shape)}


def packed(model: Any, count: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """All images' patches in one row."""
    side = model.config.vision_config.patch_size
    return {"pixel_values": noise(1, 3, side, 64 * count * side), "target_sizes": torch.tensor([[8, 8]] * count)}


INPUTS: dict[str, Any] = {
    "deepseek_vl_hybrid": hybrid,
    "fast_vlm": timm(3, 256, 256),
    "gemma3n": timm(3, 128, 128),
    "gemma4": placed,
    "minicpm_ocr": packed,
    "minicpmv4_6": packed,
    "minicpmv4_7": packed,
    "kimi_k25": unfolded,
    "lfm2_vl": naflex,
    "granite4_vision": anyres,
    "llava_next": anyres,
    "llava_next_video": anyres,
    "llava_onevision": anyres,
    "muse_glimmer": doubled,
    "paddleocr_vl": unfolded,
    "perception_lm": timm(1, 3, 64, 64),
    "video_llama_3": merged,
}


def features(model: Any, pixels: dict[str, Any]) -> Any:
    names = inspect.signature(model.base_model.get_image_features).parameters
    with torch.no_grad():
        return model.base_model.get_image_features(**{k: v for k, v in pixels.items() if k in names}, return_dict=True)


def feature_rows(output: Any) -> torch.Tensor:
    """(L, D) what an encoder or `prune_inputs` made of all images; Granite 4 has it in its layers alone."""
    pooled = output.pooler_output if output.pooler_output is not None else output.deepstack_features[0][1]
    parts = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def with_rows(output: Any, rows: torch.Tensor) -> Any:
    """A copy of an encoder's output with other features of one image."""
    changed = copy.copy(output)
    if output.pooler_output is None:
        changed.deepstack_features = [(layer, [rows]) for layer, _ in output.deepstack_features]
    elif isinstance(output.pooler_output, torch.Tensor):
        changed.pooler_output = rows.reshape(output.pooler_output.shape)
    else:
        changed.pooler_output = [rows]
    return changed


def make_inputs(model: Any, kind: str, count: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    errors = []
    for way in [INPUTS[kind]] if kind in INPUTS else KINDS:
        pixels = way(model, count, noise)
        try:
            total = len(feature_rows(features(model, pixels)))
            break
        except Exception as error:
            errors.append(f"{way.__name__}: {type(error).__name__} {error}")
    else:
        raise AssertionError("; ".join(errors))
    prompts = []
    for i in range(count):
        words = torch.randint(10, 180, (12,), generator=generator).tolist()
        prompts.append([1, *words[: 3 + i], START, *[IMAGE] * (total // count), END, *words[5 - 3 + i : 9]])
    width = max(map(len, prompts))
    gaps = [width - len(p) for p in prompts]
    ids = torch.tensor([[0] * g + p for g, p in zip(gaps, prompts, strict=True)])
    mask = torch.tensor([[0] * g + [1] * len(p) for g, p in zip(gaps, prompts, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask} | pixels
    names = inspect.signature(type(model).forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = (ids == IMAGE).long()
    return inputs


def alone(both: dict[str, Any], i: int) -> dict[str, Any]:
    """Prompt i of two, without padding; each takes half of every pixel input."""
    valid = both["attention_mask"][i].bool()
    own = {}
    for name, value in both.items():
        if name == "pixel_values" and len(value) == 1:
            own[name] = value.chunk(2, -1)[i]
        elif value.shape == both["input_ids"].shape:
            own[name] = value[i : i + 1, valid]
        else:
            own[name] = value.chunk(2)[i]
    return own
