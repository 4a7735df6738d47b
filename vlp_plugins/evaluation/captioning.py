"""Captions that a model writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vlp_plugins.adapter import Adapter, Batch, CaptioningAdapter
from vlp_plugins.calibration.batches import to_device
from vlp_plugins.errors import DataError, UnsupportedError
from vlp_plugins.evaluation.inference import evaluating


def write_captions(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    tokenizer: Any,
    *,
    max_length: int = 30,
) -> list[str]:
    """Greedy captions of the images of all batches, in their order.

    Args:
        model: is left in the mode it was in.
        adapter: knows how the model writes captions.
        batches: with `pixel_values`; captions in them are not read.
        tokenizer: the model's, or a processor that has one.
        max_length: most tokens of a caption, the start token included.

    Raises:
        UnsupportedError: if models of this family write no captions.
        DataError: if the processor has no tokenizer.
    """
    if not isinstance(adapter, CaptioningAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} says of no model how it writes captions; measure retrieval, "
            "or take a model with a text decoder such as BLIP"
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(tokenizer, "batch_decode"):
        raise DataError(
            f"captions need the model's tokenizer to be read, not {type(tokenizer).__name__}"
        )
    written: list[str] = []
    with evaluating(model) as device:
        for batch in batches:
            tokens = adapter.caption(model, to_device(batch, device), max_length=max_length)
            texts = tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
            written += [text.strip() for text in texts]
    return written
