"""Batches of a model's own processor from what a recipe says about data."""

from __future__ import annotations

from torch import nn

from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import Processor, load_processor, reads_text
from vlp_plugins.data.sources import open_source
from vlp_plugins.job.images_only import ImagesOnly, takes_no_text
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.recipes.recipe import DataRecipe


def processor_for(
    source: str, model: nn.Module, adapter: Adapter, *, max_length: int | None = None
) -> Processor:
    """The processor of a model; one of images only for a model that takes no text.

    Args:
        source: where the processor is: path or hub id.
        model: that it makes batches for.
        adapter: claims the model.
        max_length: most tokens of a caption; None asks the tokenizer.

    Raises:
        DataError: if there is none.
    """
    processor = load_processor(source, max_length=max_length)
    if not reads_text(processor) and takes_no_text(model, adapter):
        return ImagesOnly(processor)
    return processor


def batches_for(
    source: str, data: DataRecipe, processor: Processor, adapter: Adapter
) -> CaptionedBatches:
    """The batches; a model of images only gets them without captions.

    Args:
        source: of the pairs; see `open_source`.
        data: how they are read; its own source does not matter.
        processor: of the model.
        adapter: collates them.

    Raises:
        DataError: if there is no data.
    """
    return CaptionedBatches(
        open_source(
            source,
            split=data.split,
            image_column=data.image_column,
            caption_column=data.caption_column,
            captions="first" if reads_text(processor) else "none",
        ),
        processor,
        adapter,
        data.batch_size,
        limit=data.batches,
        shuffle_seed=data.seed,
    )
