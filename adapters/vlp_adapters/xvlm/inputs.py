"""What X-VLM reads from a batch, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vlp_adapters.inputs import pairs_of
from vlp_plugins.adapter import Batch, need

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForPretraining

INPUTS = ("pixel_values", "input_ids", "attention_mask")


def image_embeds_of(model: XvlmForPretraining, batch: Batch) -> Tensor:
    """Image tokens `[B, T, Dv]`: `image_embeds` of the batch, or made from `pixel_values`."""
    embeds: Tensor | None = batch.get("image_embeds")
    return model.encode_image(*need(batch, "pixel_values")) if embeds is None else embeds


def text_embeds_of(model: XvlmForPretraining, batch: Batch) -> Tensor:
    """Text states `[B, L, D]`: `text_embeds` of the batch, or made from `input_ids`."""
    embeds: Tensor | None = batch.get("text_embeds")
    if embeds is None:
        return model.encode_text(*need(batch, "input_ids", "attention_mask"))
    return embeds


def matching_pairs(model: XvlmForPretraining, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Images, token ids and mask of a batch that fit each other and the model.

    Raises:
        BatchError: if one is missing, or they do not fit.
    """
    return pairs_of(batch, model.config.text_config.max_position_embeddings)
