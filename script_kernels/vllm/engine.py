"""All that is imported from vLLM, in one place: what a new version moves is mended here. For 0.32 and 0.31."""

from vllm.logger import init_logger
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    get_anyres_image_grid_shape,
)
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, PlaceholderRange
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import InputProcessingContext, ProcessorInputs, PromptUpdateDetails

__all__ = [
    "MULTIMODAL_REGISTRY",
    "ImageProcessorItems",
    "InputProcessingContext",
    "InternS1ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaMultiModalProcessor",
    "LlavaNextForConditionalGeneration",
    "MultiModalFieldConfig",
    "PlaceholderRange",
    "ProcessorInputs",
    "PromptUpdateDetails",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "get_anyres_image_grid_shape",
    "init_logger",
]
