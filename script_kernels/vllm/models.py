"""The model's side: the stock classes, with what their encoders return pruned, and positions that know what is out.

Models with (t, h, w) positions: a survivor carries its own (t, h, w) within the image, in extra channels, through the
encoder cache. The engine gives all of an image's placeholders the position where the image starts, and the text after
it the one that it has in the full prompt; `embed_input_ids` takes the channels off, and `forward` adds them. So a
cached image fits any prompt, and a chunk needs nothing from the ones before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..options import Grids
from . import engine, metrics
from .processing import ORDER, QUERY, AnyResolution, image_token_id, order_of, register
from .select import POSITION_CHANNELS, attach_positions, choose, detach_positions, grid_positions
from .settings import Order, engine_settings


def refuse(condition: object, model: object, what: str) -> None:
    if condition:
        raise ValueError(f"script_keep: expected {type(model).__name__} without {what}, got it with")


class PrunedModel:
    """Goes before a stock model among a class's bases."""

    pruned = True
    config: Any
    described_by: tuple[str, ...] = ()  # inputs of the encoder that `grids` looks at

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pruning = engine_settings(vllm_config.model_config).on
        self.width = vllm_config.model_config.get_hidden_size()
        if self.pruning:
            multimodal = vllm_config.model_config.get_multimodal_config()
            lora = vllm_config.lora_config
            refuse(multimodal.is_multimodal_pruning_enabled(), self, "the engine's own pruning (video_pruning_rate)")
            refuse(
                vllm_config.compilation_config.cudagraph_mm_encoder,
                self,
                "cudagraph_mm_encoder, which goes round the selection",
            )
            refuse(lora and lora.enable_tower_connector_lora, self, "enable_tower_connector_lora")

    def base_rows(self) -> int:
        """Rows of an any-resolution image before its first line."""
        return 0

    def grids(self, order: Order, inputs: Mapping[str, Any]) -> Grids | None:
        """In which an image's rows lie line by line, without those of newlines; None where that is not known.

        inputs: what the encoder got of this image.
        """
        return None

    def side(self) -> int:
        """Patches of a side of the picture that the encoder sees."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        rows, words = kwargs.pop(ORDER, None), kwargs.pop(QUERY, None)
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if not self.pruning or rows is None:
            return features
        orders = [Order.unpack(row.tolist()) for row in rows]
        return self.prune_step(list(features), orders, words, kwargs)

    @torch.no_grad()
    def prune_step(self, features: list[Tensor], orders: list[Order], words: Any, kwargs: dict[str, Any]) -> Any:
        """Prunes what the encoder gave in one step, all images together."""
        start = perf_counter()
        queries = [self.embed_query(ids, rows) for ids, rows in zip(words, features, strict=True)]
        inputs = [{name: kwargs[name][i] for name in self.described_by} for i in range(len(orders))]
        grids = [self.grids(order, own) for order, own in zip(orders, inputs, strict=True)]
        chosen = choose(features, orders, queries, self.width, self.base_rows(), grids)
        kept = [rows if own is None else rows[own] for rows, own in zip(features, chosen, strict=True)]
        for rows, order in zip(kept, orders, strict=True):
            if order.after and len(rows) != order.after:
                raise RuntimeError(f"image rows: expected the prompt's {order.after}, kept {len(rows)}")
        metrics.count_step(orders, perf_counter() - start)
        return self.finish(kept, chosen, orders, kwargs)

    def finish(
        self, kept: list[Tensor], chosen: Sequence[Tensor | None], orders: list[Order], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        return kept

    def embed_query(self, ids: Tensor, rows: Tensor) -> Tensor | None:
        """The (Q, C) words of one image's question, or None without one."""
        if not len(ids):
            return None
        table = self.get_language_model().embed_input_ids  # type: ignore[attr-defined]
        return table(ids.to(rows.device)).to(rows.dtype)


class PrunedMrope(PrunedModel):
    """Keeps each survivor at its (t, h, w) of the full prompt."""

    described_by = ("image_grid_thw",)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._places: tuple[Tensor, Tensor] | None = None
        if self.pruning:
            refuse(vllm_config.parallel_config.pipeline_parallel_size > 1, self, "pipeline parallelism")
            refuse(vllm_config.speculative_config, self, "speculative decoding")
            mode = vllm_config.compilation_config.cudagraph_mode
            refuse(
                mode is not None and mode.mixed_mode().name == "FULL",
                self,
                "cudagraph_mode FULL, where a replayed prefill goes round the positions (FULL_AND_PIECEWISE does not)",
            )

    def grid(self, image_grid_thw: Any) -> tuple[int, int, int]:
        """(t, h, w) of an image's rows after the merger."""
        t, h, w = (int(size) for size in image_grid_thw.tolist())
        merge = self.config.vision_config.spatial_merge_size
        return t, h // merge, w // merge

    def grids(self, order: Order, inputs: Mapping[str, Any]) -> Grids | None:
        frames, rows, columns = self.grid(inputs["image_grid_thw"])
        return [(rows, columns)] * frames

    def finish(
        self, kept: list[Tensor], chosen: Sequence[Tensor | None], orders: list[Order], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        carried = []
        for rows, own, order, thw in zip(kept, chosen, orders, kwargs["image_grid_thw"], strict=True):
            places = grid_positions(self.grid(thw))
            if order.after and len(places) != order.before:
                raise RuntimeError(f"image rows: expected {order.before}, its grid has {len(places)}")
            carried.append(
                attach_positions(rows, places if own is None else places[own.cpu()]) if order.after else rows
            )
        return carried

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        self._places = None
        if self.pruning and multimodal_embeddings is not None and len(multimodal_embeddings):
            multimodal_embeddings = self.take_places(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def take_places(self, embeddings: Sequence[Tensor], is_multimodal: Tensor | None) -> list[Tensor]:
        """The embeddings without their extra channels, which are kept for `forward`."""
        assert is_multimodal is not None
        stripped, places = [], []
        for rows in embeddings:
            # Levels of DeepStack are as wide as the embedding itself.
            if rows.shape[-1] % self.width == POSITION_CHANNELS:
                rows, own = detach_positions(rows)
            else:
                own = torch.zeros(len(rows), POSITION_CHANNELS, dtype=torch.int64, device=rows.device)
            stripped.append(rows)
            places.append(own)
        offsets = torch.cat(places)
        columns = is_multimodal.nonzero()[:, 0]
        if len(columns) != len(offsets):
            raise RuntimeError(f"image rows: expected {len(columns)}, as the step has placeholders, got {len(offsets)}")
        self._places = columns.to(offsets.device), offsets
        return stripped

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        places, self._places = self._places, None
        if places is not None:
            columns, offsets = places
            # In place: a compiled graph reads the engine's own buffer, which the engine fills anew at each step.
            positions.index_add_(1, columns.to(positions.device), offsets.T.to(positions))
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """The stock positions of the full prompt, at what is left of it."""
        orders = [order_of(f.data) if f.modality == "image" and f.data is not None else None for f in mm_features]
        if not any(orders):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        token = image_token_id(self.config)
        tokens: list[int] = []
        columns: list[int] = []  # of the full prompt, for each token of the short one
        features = []
        done = 0
        for feature, order in sorted(
            zip(mm_features, orders, strict=True), key=lambda pair: pair[0].mm_position.offset
        ):
            place = feature.mm_position
            columns += range(len(tokens), len(tokens) + place.offset - done)
            tokens += input_tokens[done : place.offset]
            done = place.offset
            if order is not None:
                if place.length != order.after or place.is_embed is not None:
                    raise RuntimeError(f"image rows: expected {order.after} placeholders, got {place.length}")
                columns += [len(tokens)] * order.after
                full = engine.PlaceholderRange(offset=len(tokens), length=order.before)
                tokens += [token] * order.before
                done += place.length
            else:
                full = replace(place, offset=len(tokens))
            features.append(replace(feature, mm_position=full))
        columns += range(len(tokens), len(tokens) + len(input_tokens) - done)
        tokens += input_tokens[done:]
        positions, delta = super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]
        for feature, order in zip(features, orders, strict=True):
            if order is not None:
                self.check_grid(positions, feature)
        return positions[:, torch.tensor(columns)], delta + len(tokens) - len(input_tokens)

    def check_grid(self, positions: Tensor, feature: Any) -> None:
        """That the engine counts an image's rows as the carried positions do: from where it starts."""
        start, length = feature.mm_position.offset, feature.mm_position.length
        own = positions[:, start : start + length].T
        if not torch.equal(own - own[0], grid_positions(self.grid(feature.data["image_grid_thw"].data)).to(own)):
            raise RuntimeError("image positions: expected (t, h, w) of its grid from where it starts, got others")


class PrunedLlava(PrunedModel, engine.LlavaForConditionalGeneration):
    def grids(self, order: Order, inputs: Mapping[str, Any]) -> Grids | None:
        side = self.side()
        return [(side, side)] if order.before == side * side else None


class PrunedLlavaNext(PrunedModel, engine.LlavaNextForConditionalGeneration):
    def base_rows(self) -> int:
        return self.side() ** 2

    def grids(self, order: Order, inputs: Mapping[str, Any]) -> Grids | None:
        crops = order.before - order.newlines - self.base_rows()
        base = (self.side(), self.side())
        return [base, (order.newlines, crops // order.newlines)] if order.newlines else None


class PrunedInternVL(PrunedModel, engine.InternS1ForConditionalGeneration):
    def grids(self, order: Order, inputs: Mapping[str, Any]) -> Grids | None:
        vision = self.config.vision_config
        patches = zip(vision.image_size, vision.patch_size, strict=True)
        rows, columns = (int(size // patch * self.config.downsample_ratio) for size, patch in patches)
        tiles, rest = divmod(order.before, rows * columns)
        return None if rest else [(rows, columns)] * tiles


class PrunedQwen2VL(PrunedMrope, engine.Qwen2VLForConditionalGeneration):
    pass


class PrunedQwen2_5_VL(PrunedMrope, engine.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    pass


class PrunedQwen3VL(PrunedMrope, engine.Qwen3VLForConditionalGeneration):
    pass


register(PrunedLlava, only=(engine.LlavaMultiModalProcessor,))
register(PrunedLlavaNext, AnyResolution)
for _model in (PrunedInternVL, PrunedQwen2VL, PrunedQwen2_5_VL, PrunedQwen3VL):
    register(_model)
