"""Every type that takes videos: pruned against the unpruned model, on tiny random models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import vlm_types
import vlm_zoo
from vlm_checks import hold_pruning
from vlm_zoo import END, IMAGE, START, VIDEO, feature_rows, make_model

from script_kernels.transformers import prune_inputs

FRAMES = 2


def video(model: Any, kind: str) -> dict[str, Any]:
    """The pixels of one video: what the type takes for a picture, for each of its frames."""
    image = vlm_zoo.make_inputs(model, kind)
    pixels = image["pixel_values"]
    names = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(6)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if "video_grid_thw" in names:
        sizes = {
            "video_grid_thw": torch.tensor([[FRAMES, 8, 12]]),
            "video_merge_sizes": torch.tensor([2]),
            "video_second_per_grid": torch.tensor([1.0]),
        }
        frames = noise(FRAMES * len(pixels), *pixels.shape[1:])
        return {"pixel_values_videos": frames} | {name: value for name, value in sizes.items() if name in names}
    if "target_sizes_videos" in names:  # all frames' patches in one row
        frames = noise(*pixels.shape[:3], FRAMES * pixels.shape[3])
        return {"pixel_values_videos": frames, "target_sizes_videos": torch.tensor([[8, 8]] * FRAMES)}
    if "video_position_ids" in names:
        return {
            "pixel_values_videos": noise(FRAMES, *pixels.shape[1:]).sigmoid(),
            "video_position_ids": image["image_position_ids"].expand(FRAMES, -1, -1),
            "num_frames_per_video": torch.tensor([FRAMES]),
        }
    return {"pixel_values_videos": noise(1, 8, *pixels.shape[-3:])}


def make_inputs(model: Any, kind: str) -> tuple[dict[str, Any], torch.Tensor]:
    """One prompt with one video, and the video's features (L, D)."""
    shown = video(model, kind)
    names = inspect.signature(model.base_model.get_video_features).parameters
    with torch.no_grad():
        output = model.base_model.get_video_features(
            **{name: value for name, value in shown.items() if name in names}, return_dict=True
        )
    rows = feature_rows(output)
    token = IMAGE if kind in AS_IMAGES else VIDEO
    if kind in BY_FRAME:
        placeholders = [40, START, *[token] * (len(rows) // FRAMES), END] * FRAMES
    else:
        placeholders = [START, *[token] * len(rows), END]
    ids = torch.tensor([[1, 20, 21, *placeholders, 30, 31, 32]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | shown
    names = inspect.signature(type(model).forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = (ids == token).long() * 2
    return inputs, rows


# Between the frames stand times, and here a word; of the last ones the placeholders are a picture's.
AS_IMAGES = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
BY_FRAME = (
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "minicpmv4_7", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"),
    *AS_IMAGES,
)


@pytest.mark.parametrize("kind", [kind for kind in vlm_types.VIDEOS if kind not in vlm_types.VIDEOS_ELSEWHERE])
def test_a_type_prunes_videos_right(kind):
    vlm_types.skip_before(kind, vlm_types.VIDEOS_SINCE)
    model = make_model(kind)
    inputs, rows = make_inputs(model, kind)
    hold_pruning(model, inputs, "video", rows, 3)


def test_one_placeholder_for_pictures_and_videos_needs_the_types():
    model = make_model("glm4v")
    inputs, _ = make_inputs(model, "glm4v")
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids: expected with this model"):
        prune_inputs(model, inputs, 3)


def test_every_type_that_takes_videos_is_held():
    """By what the classes take; a type whose videos nobody tried would be silent here."""
    for kind in vlm_types.PROVEN:
        name = vlm_zoo.TYPES.get(kind)
        model = getattr(vlm_zoo.transformers, name if isinstance(name, str) else name[0], None) if name else None
        if model is None or vlm_types.SINCE.get(kind, (0, 0)) > vlm_types.VERSION:
            continue
        takes = "pixel_values_videos" in inspect.signature(model.forward).parameters
        # Perception LM encodes videos as pictures, by no function that pruning could call: refused as an input.
        assert takes == (kind in vlm_types.VIDEOS or kind == "perception_lm"), kind


def test_sound_beside_pictures_is_refused():
    model = make_model("qwen2_5_omni_thinker")
    inputs, _ = make_inputs(model, "qwen2_5_omni_thinker")
    with pytest.raises(ValueError, match="input_features: expected none"):
        prune_inputs(model, inputs | {"input_features": torch.zeros(1, 8, 8)}, 3)
