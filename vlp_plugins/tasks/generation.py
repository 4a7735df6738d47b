"""Texts that a model of transformers generates after the prompts of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import UnsupportedError, first_line


def generates(model: nn.Module) -> bool:
    """Whether transformers' `generate` is for this model."""
    can: Any = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


def generate(model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1) -> Tensor:
    """The most likely continuation of each prompt of a batch.

    Args:
        model: of transformers, with a head that generates.
        batch: prompts, padded on the left, with what the processor made of their images.
        max_length: most tokens of a continuation.
        num_beams: width of the beam search; 1 is greedy.

    Returns:
        `[B, L]` token ids, without the prompts.

    Raises:
        UnsupportedError: if the model does not take such a batch.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
        if name != "labels"
    }
    run: Any = model.generate
    try:
        made: Tensor = run(
            **inputs, max_new_tokens=max_length, num_beams=num_beams, do_sample=False
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot generate from such a batch ({', '.join(inputs)}): "
            f"{first_line(error)}"
        ) from error
    prompts: Tensor | None = inputs.get("input_ids")
    config: Any = getattr(model, "config", None)
    if prompts is None or getattr(config, "is_encoder_decoder", False):
        return made
    # Some families give back what is new alone.
    length = prompts.shape[1]
    begins = made.shape[1] >= length and torch.equal(made[:, :length], prompts.to(made.device))
    return made[:, length:] if begins else made
