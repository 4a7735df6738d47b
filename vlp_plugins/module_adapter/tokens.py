"""Which tokens are real in an unknown model: told by the user, else by names, never by lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlp_plugins.adapter import Batch, need
from vlp_plugins.runtime.errors import BatchError

_IMAGE_PATH = re.compile(r"vision|visual|image|patch", re.IGNORECASE)

# Token spaces. A space that the user named is `mask:` and the batch key of its mask.
_TEXT, _VISION, _ALL, _MASK = "text", "vision", "all", "mask:"


def token_space(path: str, told: Sequence[tuple[re.Pattern[str], str | None]]) -> str:
    """Token space of the input of the layer at `path`.

    Args:
        path: of the layer.
        told: pattern and the batch key of the mask, or None where all tokens are real. The first
            pattern found in `path` counts.
    """
    for pattern, key in told:
        if pattern.search(path):
            return _ALL if key is None else f"{_MASK}{key}"
    return _VISION if _IMAGE_PATH.search(path) else _TEXT


def real_tokens(space: str, batch: Batch | Sequence[Any] | Tensor) -> Tensor | None:
    """`[batch, tokens]` bool, true where a token of `space` is real; None where all are.

    Raises:
        BatchError: if the batch has no mask where one is needed, or one of a wrong rank.
    """
    key = _mask_key(space, batch)
    if key is None:
        return None
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"tokens names the batch key {key!r}, but batches are {type(batch).__name__}s; "
            "make the loader return mappings"
        )
    (mask,) = need(batch, key)
    if mask.ndim != 2:
        raise BatchError(f"{key} should be [batch, tokens] but has shape {list(mask.shape)}")
    return mask != 0


def _mask_key(space: str, batch: Batch | Sequence[Any] | Tensor) -> str | None:
    """Key of the batch that holds the mask of `space`; None if all its tokens are real."""
    if space.startswith(_MASK):
        return space.removeprefix(_MASK)
    if space == _ALL or not isinstance(batch, Mapping):
        return None
    if space == _VISION and "pixel_values" in batch:
        return None
    has_text = "input_ids" in batch or "attention_mask" in batch
    return "attention_mask" if has_text else None
