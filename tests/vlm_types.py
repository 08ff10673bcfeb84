"""The types of transformers' models that the tests hold, and the documentation's tables of them."""

from __future__ import annotations

import pathlib

import pytest
import transformers

from script_kernels.transformers.families import FAMILIES, REFUSED

# Types that 5.18 has not, or whose classes there take other inputs or no features back: the first version that is held.
SINCE = dict.fromkeys(
    (
        "cosmos3_edge",
        "granite4_vision",
        "hy_v4_vl",
        "lfm3_vl",
        "minicpm_ocr",
        "minimax_m3_vl",
        "paddleocr_vl",
        "video_llava",
    ),
    (5, 24),
)
# Their encoder is timm's: held where it can be imported (make test-timm).
TIMM_TYPES = ("fast_vlm", "gemma3n", "perception_lm")
# Types whose videos are held, by test_transformers_videos; the four elsewhere by what tests them as pictures too.
VIDEOS_ELSEWHERE = ("llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
VIDEOS = (
    *VIDEOS_ELSEWHERE,
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5", "gemma4", "glm46v", "glm4v"),
    *("glm4v_moe", "glm_ocr", "glmga", "hy_v4_vl", "hyperclovax_vision_v2", "kimi_k25", "lfm3_vl", "minicpm_ocr"),
    *("minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "qwen2_5_omni_thinker", "qwen2_vl", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_omni_moe_thinker", "qwen3_vl_moe", "video_llama_3", "video_llava"),
)
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# The types that the tests hold, as transformers names them.
PROVEN = (
    "aria",
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "fast_vlm",
    "gemma3",
    "gemma3n",
    "gemma4",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "got_ocr2",
    "granite4_vision",
    "hy_v4_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "minimax_m3_vl",
    "mistral3",
    "ovis2",
    "paddleocr_vl",
    "paligemma",
    "perception_lm",
    "pp_chart2table",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "shieldgemma2",
    "smolvlm",
    "step3p7",
    "video_llama_3",
    "video_llava",
    "vipllava",
)
_NO_MODEL = "no tiny model was made of its config"
# Types that take features, and of which no test says more than the check at first use does.
UNTESTED = {
    "chameleon": "its config names the placeholder in a vocabulary alone, so that none is found",
    "hunyuan_vl": "its positions have axes of their own, and the check refuses it",
} | dict.fromkeys(
    (
        *("apertus1p5", "deepseek_ocr2", "diffusion_gemma", "dots3_note", "emu3", "gemma4_unified", "glm5_next"),
        *("granite_docling", "inkling2", "inkling2_loop", "inkling_mm_model", "mistral_large4", "molmo2"),
        *("muse_glimmer", "muse_spark", "nemotron_h_omni", "qwen4_exp", "unlimited_ocr"),
    ),
    _NO_MODEL,
)

VIDEOS_SINCE = SINCE | dict.fromkeys(("gemma4", "kimi_k25"), (5, 24))


def skip_before(kind: str, since: dict[str, tuple[int, ...]] = SINCE) -> None:
    if since.get(kind, (0, 0)) > VERSION:
        pytest.skip(f"{kind} is held from {since[kind]} on")
    if kind in TIMM_TYPES:
        pytest.importorskip("timm", reason="an encoder of timm's: make test-timm")


def videos(kind: str) -> str:
    if kind not in VIDEOS:
        return "no"
    since = VIDEOS_SINCE.get(kind, ())
    return "yes" if since == SINCE.get(kind, ()) else "from " + ".".join(map(str, since))


def table() -> str:
    """The documentation's table of types: what `test_a_type_is_pruned_right` holds, row for row."""
    oldest = "5.18"
    rows = []
    for kind in PROVEN:
        family = FAMILIES.get(kind)
        checked = "no" if family is not None and family.proven else "yes"
        since = ".".join(map(str, SINCE.get(kind, oldest.split("."))))
        rows.append(f"| `{kind}` | yes | {videos(kind)} | {checked} | {since} |")
    head = (
        "| `model_type` | images | video | checked at first use | tested from transformers |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def refusals() -> str:
    return "".join(f"- `{kind}`: {reason}.\n" for kind, reason in sorted(REFUSED.items()))


def untested() -> str:
    reasons: dict[str, list[str]] = {}
    for kind, reason in sorted(UNTESTED.items()):
        reasons.setdefault(reason, []).append(f"`{kind}`")
    return "".join(f"- {', '.join(kinds)}: {reason}.\n" for reason, kinds in reasons.items())


if __name__ == "__main__":
    page = pathlib.Path(__file__).parents[1] / "docs" / "transformers.md"
    text = page.read_text()
    for name, part in (("types", table()), ("untested", untested()), ("refused", refusals())):
        begin = text.index("-->", text.index(f"<!-- {name}:")) + 3
        text = text[:begin] + "\n\n" + part + "\n" + text[text.index(f"<!-- /{name} -->") :]
    page.write_text(text)
