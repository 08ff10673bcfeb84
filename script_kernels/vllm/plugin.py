"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from __future__ import annotations

from typing import Any

from .settings import engine_settings, from_environment

# The architectures that can be pruned, and the classes in `models` that take their place.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "PrunedLlava",
    "LlavaNextForConditionalGeneration": "PrunedLlavaNext",
    "InternVLForConditionalGeneration": "PrunedInternVL",
    "Qwen2VLForConditionalGeneration": "PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "PrunedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "PrunedQwen3VL",
}


# The oldest minor that the tests run on.
OLDEST = (0, 31)


def too_old(version: str) -> bool:
    """Whether this is a release before `OLDEST`. A build from a checkout without tags has no number that tells."""
    numbers = version.split(".")[:2]
    return "dev" not in version and all(n.isdigit() for n in numbers) and tuple(int(n) for n in numbers) < OLDEST


def register() -> None:
    """Puts the pruned classes in the place of the stock ones, which they are until something is configured.

    Raises ValueError for a bad setting in the environment.
    """
    import vllm

    from_environment()
    if not too_old(vllm.__version__):
        for architecture, name in ARCHITECTURES.items():
            vllm.ModelRegistry.register_model(architecture, f"script_kernels.vllm.models:{name}")
    refuse_others()


def refuse_others() -> None:
    """Has vLLM refuse at start-up to prune a model that cannot be, or by a version that cannot.

    Where it makes the model's processor: there the engine's arguments are known.
    """
    import vllm
    from vllm.multimodal import MULTIMODAL_REGISTRY

    stock = MULTIMODAL_REGISTRY.create_processor
    if getattr(stock, "refuses", False):
        return

    def create_processor(model_config: Any, **kwargs: Any) -> Any:
        settings = engine_settings(model_config)
        names = model_config.architectures
        if settings.on and too_old(vllm.__version__):
            raise ValueError(f"script_keep: expected vLLM {OLDEST[0]}.{OLDEST[1]} or newer, got {vllm.__version__}")
        if settings.on and not any(name in ARCHITECTURES for name in names):
            raise ValueError(
                f"script_keep: expected a model of one of {', '.join(ARCHITECTURES)}, got {', '.join(names)}"
            )
        return stock(model_config, **kwargs)

    create_processor.refuses = True  # type: ignore[attr-defined]
    MULTIMODAL_REGISTRY.create_processor = create_processor
