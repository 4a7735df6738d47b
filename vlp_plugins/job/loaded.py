"""A model with its adapter, its weights and its own processor, ready to be given batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import Processor
from vlp_plugins.job.batches import batches_for, processor_for
from vlp_plugins.loading import load_model
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.recipes.recipe import DataRecipe


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as the command line names it.

    Attributes:
        model: path or hub id.
        adapter: name; None asks all.
        processor: path or hub id; None takes the model's.
        dtype: of the model.
        device: None takes a GPU if there is one.
    """

    model: str
    adapter: str | None = None
    processor: str | None = None
    dtype: str = "float32"
    device: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it; no data has been read."""

    source: ModelSource
    model: nn.Module
    adapter: Adapter
    weights: WeightMap
    processor: Processor

    @classmethod
    def of(cls, source: ModelSource, *, max_length: int | None = None) -> Loaded:
        """Loads and checks.

        Args:
            source: of the model.
            max_length: most tokens of a caption; None asks the tokenizer.

        Raises:
            VlpError: if something is unknown, missing or damaged.
        """
        model, adapter = load_model(
            source.model, adapter=source.adapter, dtype=source.dtype, device=source.device
        )
        weights = WeightMap.of(model, adapter)
        weights.check_finite()
        place = source.processor or source.model
        processor = processor_for(place, model, adapter, max_length=max_length)
        return cls(source, model, adapter, weights, processor)

    def batches(self, data: DataRecipe) -> CaptionedBatches:
        """Batches of captioned images.

        Raises:
            DataError: if there are none.
        """
        return batches_for(str(data.source), data, self.processor, self.adapter)
