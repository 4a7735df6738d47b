"""Captions that a model writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.models.adapter import Adapter, Batch, CaptioningAdapter
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model


@takes_model
def write_captions(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    tokenizer: Any,
    *,
    max_length: int = 30,
    num_beams: int = 1,
) -> list[str]:
    """Captions of the images of all batches, in their order.

    Args:
        model: is left in the mode it was in.
        adapter: knows how the model writes captions.
        batches: with `pixel_values`; captions in them are not read.
        tokenizer: the model's, or a processor that has one.
        max_length: most tokens of a caption, the start token included.
        num_beams: width of the beam search; 1 is greedy.

    Raises:
        UnsupportedError: if models of this family write no captions.
        DataError: if the processor has no tokenizer.
    """
    if not isinstance(adapter, CaptioningAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} says of no model how it writes captions; measure retrieval, "
            "or take a model with a text decoder such as BLIP"
        )
    tokenizer = tokenizer_of(tokenizer, "captions need")
    written: list[str] = []
    check_batches(batches)
    with evaluating(model) as device:
        for batch in batches:
            tokens = adapter.caption(
                model, to_device(batch, device), max_length=max_length, num_beams=num_beams
            )
            written += texts_of_tokens(tokenizer, tokens)
    return written


def tokenizer_of(processor: Any, who: str) -> Any:
    """The tokenizer of a processor, or what was given if it is one.

    Raises:
        DataError: if there is none; `who` begins the sentence.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "batch_decode"):
        raise DataError(f"{who} the model's tokenizer to be read, not {type(tokenizer).__name__}")
    return tokenizer


def texts_of_tokens(tokenizer: Any, tokens: Tensor) -> list[str]:
    """The texts of ids `[B, L]`, without special tokens."""
    texts = tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
    return [text.strip() for text in texts]
