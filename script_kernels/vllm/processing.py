"""The processor's side: how many placeholders an image gets, what the model is told, what the caches know it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from . import engine, metrics
from .settings import Order, Settings, engine_settings, is_setting, without_settings

# The key under which a prompt's request travels through the stock processor, beside the image processor's.
REQUEST = "script_request"
# The fields of an image that the model gets: an `Order`, and the ids of the user's words.
ORDER, QUERY = "script_order", "script_query_ids"


@dataclass(frozen=True)
class Request:
    """What one prompt asks for; `query` holds the ids of the user's words, empty without a query."""

    settings: Settings
    query: tuple[int, ...]


def named(request: Request | None, hashes: Any) -> Any:
    """Identities of a prompt's items, the images' with what was asked for in front."""
    if request is None or not request.settings.on or "image" not in hashes:
        return hashes
    prefix = request.settings.identity(request.query)
    return {**hashes, "image": [prefix + name for name in hashes["image"]]}


class Inputs(engine.ProcessorInputs):
    """Those of vLLM 0.31, which are asked for the identities themselves; from 0.32 on the processor is."""

    def get_mm_hashes(self, *how: Any, **options: Any) -> Any:
        request, kwargs = split(self.hf_processor_mm_kwargs)
        if request is None:
            return super().get_mm_hashes(*how, **options)
        return named(request, replace(self, hf_processor_mm_kwargs=kwargs).get_mm_hashes(*how, **options))


class Context(engine.InputProcessingContext):
    """Keeps our settings, which are among the engine's processor keywords, from the image processor."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **others: Any) -> dict[str, Any]:
        return without_settings(super().get_merged_mm_kwargs(kwargs, **others))


def user_words(prompt: list[int], info: Any) -> tuple[int, ...]:
    """Ids of the user's words in the last turn, without template and special ids; empty if there are none.

    With several turns: the last one's, wherever the images stand. See `script_kernels.transformers.query.user_columns`.
    """
    from script_kernels.transformers.query import user_columns

    config = info.get_hf_config()
    tokenizer = info.get_tokenizer()
    image = image_token_id(config)
    if image not in prompt:
        return ()
    model = SimpleNamespace(config=config, generation_config=None)
    template = tokenizer if getattr(tokenizer, "chat_template", None) else None
    # Each image is one placeholder in the prompt at this point.
    columns = user_columns(prompt, {image}, model, template)
    return tuple(prompt[column] for column in columns)


def image_token_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise AttributeError("config: expected image_token_id or image_token_index, got neither")


class PruningProcessor:
    """Goes before a stock multimodal processor among a class's bases. With pruning off each method is the stock one."""

    info: Any

    def __init__(self, info: Any, *arguments: Any) -> None:
        super().__init__(info, *arguments)  # type: ignore[call-arg]
        self.settings = engine_settings(info.ctx.model_config)

    def count_newlines(self, size: Any) -> int:
        """Rows of an image of this size in pixels that hold no image content."""
        return 0

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        kwargs = inputs.hf_processor_mm_kwargs
        if not self.settings.on:
            unused = sorted(name for name in kwargs if is_setting(name))
            if unused:
                raise ValueError(
                    f"{unused[0]}: expected an engine that was started with script_keep or script_keep_ratio "
                    "(script_keep_ratio=1 keeps all), got one without"
                )
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        settings = self.settings.updated(kwargs)
        settings.check_complete(self.info.ctx.model_config.get_multimodal_config().mm_encoder_only)
        query = user_words(inputs.prompt, self.info) if settings.on and settings.asks else ()
        if settings.asks and not query:
            settings = replace(settings, query=None)  # the user said nothing; without a query, others share the image
            settings.check_complete()
        inputs = replace(inputs, hf_processor_mm_kwargs={**without_settings(kwargs), REQUEST: Request(settings, query)})
        if hasattr(engine.ProcessorInputs, "get_mm_hashes"):
            inputs = Inputs(**{field.name: getattr(inputs, field.name) for field in fields(inputs)})
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        metrics.count_request([order_of(item) for item in result["mm_kwargs"].get("image", ()) if item is not None])
        return result

    def _get_mm_hashes(self, inputs: Any) -> Any:
        request, kwargs = split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))  # type: ignore[misc]
        return named(request, hashes)

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        request, kwargs = split(hf_kwargs)
        inputs = super()._get_hf_mm_inputs(mm_items, kwargs)  # type: ignore[misc]
        images = mm_items.get("image", ())
        if request is None or not images:
            return inputs
        blank = Order(0, 0, 0, request.settings.rule).pack()
        fields = {
            ORDER: torch.tensor([blank] * len(images), dtype=torch.int64),
            QUERY: [torch.tensor(request.query, dtype=torch.int64)] * len(images),
        }
        return inputs._replace(passthrough_data={**inputs.passthrough_data, **fields})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, split(hf_processor_mm_kwargs)[1])  # type: ignore[misc]
        if ORDER not in hf_inputs:
            return fields
        batched = engine.MultiModalFieldConfig.batched
        return {**fields, ORDER: batched("image", keep_on_cpu=True), QUERY: batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[Any]:
        request, kwargs = split(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        images = mm_items.get("image", ())
        if request is None or not request.settings.on:
            return list(updates)
        if not isinstance(images, engine.ImageProcessorItems):
            # Images that come as embeddings were chosen by whoever made them.
            data = getattr(images, "data", None)
            if isinstance(data, Mapping) and "image_embeds" not in data:
                raise ValueError(f"image: expected pixels or image_embeds, got {', '.join(sorted(data))} alone")
            return list(updates)
        return [
            self._shortened(update, images, out_mm_kwargs["image"], request.settings)
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _shortened(self, update: Any, images: Any, items: Any, settings: Settings) -> Any:
        """The update with fewer placeholders, after each image's order is written into its item."""
        token = image_token_id(self.info.get_hf_config())
        content: Callable[[int], Any] | Any = update.content
        replacements = []
        for index in range(len(images)):
            full = content(index) if callable(content) else content
            details = full if isinstance(full, engine.PromptUpdateDetails) else None
            ids = details.full if details else full
            before, newlines = ids.count(token), self.count_newlines(images.get_image_size(index))
            after = settings.placeholders(before, newlines)
            items[index][ORDER].data[:3] = torch.tensor([before, after, newlines])
            first = ids.index(token)
            short = ids[: first + after] + ids[first + before :]
            replacements.append(replace(details, full=short) if details else short)
        return replace(update, replacement=replacements.__getitem__)


def split(kwargs: Mapping[str, object]) -> tuple[Request | None, dict[str, object]]:
    """The request among the processor keywords, and the others."""
    request = kwargs.get(REQUEST)
    assert request is None or isinstance(request, Request)
    return request, {name: value for name, value in kwargs.items() if name != REQUEST}


def order_of(item: Mapping[str, Any]) -> Order | None:
    """The order that came with an image, or None if it is left alone."""
    if ORDER not in item:
        return None
    order = Order.unpack(item[ORDER].data.tolist())
    return order if order.after else None


class AnyResolution(PruningProcessor):
    """LLaVA-NeXT: each line of patches ends in a newline row."""

    def count_newlines(self, size: Any) -> int:
        config, encoder = self.info.get_hf_config(), self.info.get_vision_encoder_info()
        rows, columns = engine.get_anyres_image_grid_shape(
            image_size=(size.height, size.width),
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        _, newlines = self.info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=rows,
            num_patch_width=columns,
        )
        return int(newlines)


def register(model: type, mixin: type[PruningProcessor] = PruningProcessor, only: tuple[type, ...] = ()) -> type:
    """Gives a model class its stock parent's processor, with `mixin` before it. `only`: the processors that will do."""
    stock = model._processor_factory  # type: ignore[attr-defined]

    def info(ctx: Any) -> Any:
        return stock.info(Context(ctx.model_config, ctx.tokenizer))

    def processor(own_info: Any, dummy_inputs: Any) -> Any:
        plain = stock.processor(own_info, dummy_inputs)
        if only and not isinstance(plain, only):
            if engine_settings(own_info.ctx.model_config).on:
                raise ValueError(f"script_keep: expected a LLaVA with CLIP or SigLIP, got {type(plain).__name__}")
            return plain
        kind = type(f"Pruning{type(plain).__name__}", (mixin, type(plain)), {"__module__": __name__})
        return kind(own_info, dummy_inputs)

    registered: type = engine.MULTIMODAL_REGISTRY.register_processor(
        processor, info=info, dummy_inputs=stock.dummy_inputs
    )(model)
    return registered
