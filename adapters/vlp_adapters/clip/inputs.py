"""What the towers read of a batch, checked, and which of their tokens are real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp_adapters.inputs import is_resized, texts_of
from vlp_plugins.models.adapter import Batch, need
from vlp_plugins.runtime.errors import BatchError

_LEGACY_END = 2  # an end token that means "the highest id of the text" to transformers' CLIP


@dataclass(frozen=True, slots=True)
class TowerInputs:
    """Inputs of one tower.

    Attributes:
        arguments: of its forward.
        real: bool `[B, tokens]`, true where a token is real; None where all are.
    """

    arguments: dict[str, Any]
    real: Tensor | None

    def __len__(self) -> int:
        """Number of images or texts."""
        first: Tensor = next(iter(self.arguments.values()))
        return len(first)


def images_of(tower: Any, batch: Batch) -> TowerInputs:
    """Images for a vision tower.

    Images of another size than the configured get interpolated positions. SigLIP 2 with images
    of any shape reads patches `[B, N, 3 * patch * patch]` with `pixel_attention_mask` `[B, N]` and
    `spatial_shapes` `[B, 2]`; there the mask says which patches are real.

    Raises:
        BatchError: if an input is missing.
    """
    if hasattr(tower.config, "num_patches"):
        pixels, mask, shapes = need(batch, "pixel_values", "pixel_attention_mask", "spatial_shapes")
        arguments = {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }
        return TowerInputs(arguments, mask.bool())
    (pixels,) = need(batch, "pixel_values")
    resized = {"interpolate_pos_encoding": True} if is_resized(tower.config, pixels) else {}
    return TowerInputs({"pixel_values": pixels, **resized}, None)


def ended_texts(tower: Any, batch: Batch) -> TowerInputs:
    """Texts for CLIP's text tower, whose feature is the state of the end token.

    Attention is causal, so nothing after the end token has any influence: those positions are
    padding, whatever the attention mask says of them.

    Raises:
        BatchError: if ids or mask are missing or do not fit, or a text has no end token.
    """
    ids, mask = texts_of(batch, tower.config.max_position_embeddings)
    end = tower.config.eos_token_id
    highest = ids.amax(dim=1, keepdim=True)
    is_end = ids == (highest if end == _LEGACY_END else end)
    last = is_end.int().argmax(dim=1, keepdim=True)  # the first of several: transformers reads it
    lacking = ~is_end.any(dim=1) | (mask.gather(1, last) == 0).squeeze(1)
    if lacking.any():
        raise BatchError(
            f"text {int(lacking.int().argmax())} of the batch has no end token "
            f"({'the highest id' if end == _LEGACY_END else f'id {end}'}) among its real tokens, "
            "where the model reads its feature; make batches with the model's own tokenizer, which "
            "ends every text, also one that it cuts"
        )
    positions = torch.arange(ids.shape[1], device=ids.device)
    real = mask.bool() & (positions <= last)
    return TowerInputs({"input_ids": ids, "attention_mask": mask}, real)


def padded_texts(tower: Any, batch: Batch) -> TowerInputs:
    """Texts for SigLIP's text tower, which was trained to read its padding.

    Its texts are padded to the full length without an attention mask: every position takes part,
    and the feature is the state of the last one. So every token is real. A batch may have a mask
    nevertheless (of a model that was tuned with one): transformers obeys it, and real are what it
    names and the last position.

    Raises:
        BatchError: if ids are missing, too long, or do not fit the mask.
    """
    (ids,) = need(batch, "input_ids")
    mask: Tensor | None = batch.get("attention_mask")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        masked = "" if mask is None else f" and attention_mask {list(mask.shape)}"
        raise BatchError(f"input_ids {list(ids.shape)}{masked} do not fit: give [B, L]")
    positions = tower.config.max_position_embeddings
    if ids.shape[1] > positions:
        raise BatchError(
            f"a text has {ids.shape[1]} tokens, the model has positions for {positions}; make "
            f"batches with padding='max_length', max_length={positions} and truncation=True"
        )
    if mask is None:
        return TowerInputs({"input_ids": ids}, None)
    real = mask.bool().clone()
    real[:, -1] = True
    return TowerInputs({"input_ids": ids, "attention_mask": mask}, real)
