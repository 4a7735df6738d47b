"""What image-text models read from a batch, checked."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlp_plugins.models.adapter import Batch, need
from vlp_plugins.runtime.errors import BatchError

_log = logging.getLogger(__name__)


def pairs_of(batch: Batch, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[B, 3, H, W]`, token ids and mask `[B, L]` of a batch.

    Args:
        batch: `pixel_values`, `input_ids`, `attention_mask`.
        positions: number of tokens that the model has positions for.

    Raises:
        BatchError: if one is missing, or they do not fit each other or the model.
    """
    pixels, ids, mask = need(batch, "pixel_values", "input_ids", "attention_mask")
    if pixels.ndim != 4:
        raise BatchError(
            f"pixel_values {list(pixels.shape)} are not one image per text, [B, 3, H, W]; two of "
            "each are for a model of NLVR2"
        )
    if len(pixels) != len(ids):
        raise BatchError(
            f"pixel_values {list(pixels.shape)}, input_ids {list(ids.shape)} and attention_mask "
            f"{list(mask.shape)} do not fit: give as many images as texts, [B, 3, H, W] and [B, L]"
        )
    return pixels, *texts_of({"input_ids": ids, "attention_mask": mask}, positions)


def image_pairs_of(batch: Batch, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two images per row `[B, 2, 3, H, W]`, token ids and mask `[B, L]` of statements.

    Args:
        batch: see `StatementAdapter`. A batch of captions, with one image per row, makes pairs of
            every image and the next one.
        positions: number of tokens that the model has positions for.

    Raises:
        BatchError: if something is missing, or does not fit.
    """
    (pixels,) = need(batch, "pixel_values")
    if pixels.ndim == 4:
        pixels = torch.stack([pixels, pixels.roll(-1, 0)], dim=1)
    if pixels.ndim != 5 or pixels.shape[1] != 2:
        raise BatchError(
            f"pixel_values {list(pixels.shape)} are not two images per row; give [B, 2, 3, H, W]"
        )
    _, ids, mask = pairs_of({**batch, "pixel_values": pixels[:, 0]}, positions)
    return pixels, ids, mask


def truths_of(batch: Batch) -> Tensor:
    """The labels `[B]` of a batch of statements: 1 true, 0 false.

    Raises:
        BatchError: if there are none, or they do not fit.
    """
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        raise BatchError(
            "the loss of a model of NLVR2 needs statements that are true or false: batch has no "
            f"labels (it has: {', '.join(batch)}); add labels, int64 [B], 1 for true, 0 for false"
        )
    rows = len(batch["input_ids"])
    if labels.shape != (rows,) or not ((labels == 0) | (labels == 1)).all():
        raise BatchError(
            f"labels {list(labels.shape)} do not fit {rows} statements; give 1 (true) or 0 (false) "
            "for each"
        )
    return labels


def texts_of(batch: Batch, positions: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[B, L]` of a batch; see `pairs_of`."""
    ids, mask = need(batch, "input_ids", "attention_mask")
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise BatchError(
            f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} do not fit: give "
            "[B, L] for both"
        )
    if ids.shape[1] > positions:
        raise BatchError(
            f"a text has {ids.shape[1]} tokens, the model has positions for {positions}; set "
            f"the tokenizer's model_max_length to {positions} or less and truncation=True"
        )
    if not mask[:, 0].all():
        raise BatchError(
            "a text starts with padding, but the model reads its first token; set the tokenizer's "
            "padding_side to 'right'"
        )
    return ids, mask


def need_partners(pairs: int, loss: str = "matching") -> None:
    """Checks that a batch has wrong partners for the loss of that name.

    Raises:
        BatchError: if it has fewer than two pairs.
    """
    if pairs < 2:
        raise BatchError(
            f"the {loss} loss takes its wrong partners from the batch, which has only "
            f"{pairs} pair(s); use batches of at least 2 and drop a last one that is smaller"
        )


def is_resized(vision_config: Any, pixel_values: Tensor) -> bool:
    """True if images `[B, 3, H, W]` are not of the size that the position embeddings are for.

    The embeddings are interpolated then, which a warning says once per size.
    """
    height, width = pixel_values.shape[-2:]
    size = vision_config.image_size
    if (height, width) == (size, size):
        return False
    _say_resized(height, width, size)
    return True


@lru_cache(maxsize=64)
def _say_resized(height: int, width: int, size: int) -> None:
    _log.warning(
        "images of %d x %d pixels, but the model is for %d x %d: its position embeddings are "
        "interpolated; give the processor of this model if that is not meant",
        height, width, size, size,
    )  # fmt: skip
