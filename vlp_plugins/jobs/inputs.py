"""A model with its adapter, its weights, its processor and its batches, as a recipe names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlp_plugins.data.batches import CaptionedBatches, open_batches
from vlp_plugins.data.processors import Processor
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.loading import load_model, processor_for
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import made_by, versions
from vlp_plugins.runtime.offload import device_of


def batches_for(
    source: str,
    data: DataRecipe,
    processor: Processor,
    adapter: Adapter,
    model: nn.Module | None = None,
) -> CaptionedBatches:
    """The batches that a recipe describes.

    Args:
        source: of the pairs; see `open_source`.
        data: how they are read; its own source is not used.
        processor: of the model.
        adapter: collates them.
        model: see `open_batches`.

    Raises:
        DataError: if there is no data.
    """
    return open_batches(
        source,
        processor,
        adapter,
        data.batch_size,
        limit=data.batches,
        shuffle_seed=data.seed,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        model=model,
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as the command line names it.

    Attributes:
        model: path or hub id.
        adapter: name; None asks all.
        processor: path or hub id; None takes the model's.
        dtype: of the model; `auto` keeps that of its checkpoint.
        device: None takes a GPU if there is one.
    """

    model: str
    adapter: str | None = None
    processor: str | None = None
    dtype: str = "auto"
    device: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it; no data has been read."""

    source: ModelSource
    model: nn.Module
    adapter: Adapter
    weights: WeightMap
    processor: Processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @classmethod
    def of(
        cls,
        source: ModelSource,
        *,
        max_length: int | None = None,
        prompt: str | None = None,
        max_pixels: int | None = None,
    ) -> Loaded:
        """Loads and checks.

        Args:
            source: of the model.
            max_length: most tokens of a caption; None asks the tokenizer.
            prompt: see `vlp_plugins.batches`, as is `max_pixels`.
            max_pixels: most pixels of an image.

        Raises:
            VlpError: if something is unknown, missing or damaged.
        """
        model, adapter = load_model(
            source.model, adapter=source.adapter, dtype=source.dtype, device=source.device
        )
        weights = WeightMap.of(model, adapter)
        weights.check_finite()
        place = source.processor or source.model
        processor = processor_for(
            model, adapter, place, max_length=max_length, prompt=prompt, max_pixels=max_pixels
        )
        return cls(source, model, adapter, weights, processor)

    def record(self, schema: int, command: str) -> dict[str, Any]:
        """How a JSON file of results begins: what made it, and of which model."""
        return {
            "schema": schema,
            "made_by": made_by(),
            "versions": versions(),
            "command": command,
            "model": self.source.model,
            "adapter": self.adapter.name,
        }

    def batches(self, data: DataRecipe) -> CaptionedBatches:
        """Batches of captioned images.

        Raises:
            DataError: if there are none.
        """
        return batches_for(str(data.source), data, self.processor, self.adapter, self.model)
