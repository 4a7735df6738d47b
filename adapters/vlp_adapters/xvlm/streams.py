"""The activation probe of X-VLM: which layers run, on what, and which tokens are real."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from vlp_adapters.inputs import pairs_of
from vlp_adapters.xvlm.weights import FUSION, TEXT, VISION
from vlp_plugins.models.adapter import Batch, Stream, need

if TYPE_CHECKING:
    from vlp_adapters.xvlm.modeling import XvlmForRetrieval


def activation_streams(
    model: XvlmForRetrieval, batch: Batch, *, published: bool
) -> Iterator[Stream]:
    """`vision`, `text` and `fusion`, to be run in this order: the last reads both others.

    Every image token is real. With `published`, the published code's mistake is repeated: where
    captions are as long as the image has tokens, it takes the keys' and values' image tokens
    for text and drops those at the positions of padding.

    Raises:
        BatchError: if inputs are missing or do not fit each other.
    """
    pixels, ids, mask = matching_pairs(model, batch)
    real = mask.bool()
    is_mistaken = published and ids.shape[1] == token_count(model, *pixels.shape[-2:])
    embeds: dict[str, Tensor] = {}

    def vision() -> Tensor:
        embeds[VISION] = model.encode_image(pixels)
        return embeds[VISION]

    def text() -> Tensor:
        embeds[TEXT] = model.encode_text(ids, mask)
        return embeds[TEXT]

    def fusion() -> Tensor:
        return model.fuse(embeds[TEXT], mask, embeds[VISION])

    return iter(
        (
            Stream(VISION, vision, {VISION: None}),
            Stream(TEXT, text, {TEXT: real}),
            Stream(FUSION, fusion, {TEXT: real, VISION: real if is_mistaken else None}),
        )
    )


def image_embeds_of(model: XvlmForRetrieval, batch: Batch) -> Tensor:
    """Image tokens `[B, T, Dv]`: `image_embeds` of the batch, or made from `pixel_values`."""
    embeds: Tensor | None = batch.get("image_embeds")
    return model.encode_image(*need(batch, "pixel_values")) if embeds is None else embeds


def text_embeds_of(model: XvlmForRetrieval, batch: Batch) -> Tensor:
    """Text states `[B, L, D]`: `text_embeds` of the batch, or made from `input_ids`."""
    embeds: Tensor | None = batch.get("text_embeds")
    if embeds is None:
        return model.encode_text(*need(batch, "input_ids", "attention_mask"))
    return embeds


def matching_pairs(model: XvlmForRetrieval, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Images, token ids and mask of a batch that fit each other and the model.

    Raises:
        BatchError: if one is missing, or they do not fit.
    """
    return pairs_of(batch, model.config.text_config.max_position_embeddings)


def token_count(model: XvlmForRetrieval, height: int, width: int) -> int:
    """Number of tokens that the vision encoder makes of an image of so many pixels."""
    vision = model.config.vision_config
    stride = vision.patch_size
    if vision.model_type == "swin":
        stride *= 2 ** (len(vision.depths) - 1)
    return 1 + (height // stride) * (width // stride)
