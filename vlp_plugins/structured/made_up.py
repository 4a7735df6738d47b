"""Made-up inputs of a model, from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import neutral_state, takes_model

_SAMPLES = 2
_TOKENS = 8
_LEGACY_END = 2  # an end token that means "the highest id of the text" to transformers' CLIP


@neutral_state()
@takes_model
def example_batch(model: nn.Module, adapter: Adapter) -> Batch:
    """Two samples of what the model's towers read; the second text is shorter and padded.

    Values depend on the configuration only. Nothing is real: it is for tracing, and for comparing
    two models of one configuration.

    Args:
        model: with a `config` of transformers.
        adapter: of the model; it says what is read, by what it asks for.

    Raises:
        UnsupportedError: if the configuration tells neither images nor texts.
    """
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Tensor] = {}
    if hasattr(vision, "image_size") or hasattr(vision, "num_patches"):
        batch |= _images(vision, generator)
    if getattr(text, "vocab_size", None):
        batch |= _texts(text, generator)
    if not batch:
        raise UnsupportedError(
            f"the configuration of {type(model).__name__} tells neither the size of images nor "
            f"of a vocabulary, so no inputs can be made up for adapter {adapter.name!r}; give a "
            "batch of your own"
        )
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def _images(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    channels, patch = getattr(config, "num_channels", 3), config.patch_size
    if hasattr(config, "num_patches"):  # SigLIP 2 reads patches of images of any shape
        side = int(config.num_patches**0.5)
        count = side * side
        pixels = torch.randn(_SAMPLES, count, channels * patch * patch, generator=generator)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(_SAMPLES, count, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * _SAMPLES),
        }
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(_SAMPLES, channels, height, width, generator=generator)}


def _texts(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Right-padded texts that end with the end token; other special tokens do not occur."""
    words = config.vocab_size
    special = {
        name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "pad")
    }
    end = special["eos"] if special["eos"] is not None else special["sep"]
    is_legacy = end == _LEGACY_END and config.model_type.startswith("clip")
    if end is None or end >= words or is_legacy:
        end = words - 1
    plain = torch.tensor([i for i in range(words) if i != end and i not in special.values()])
    length = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
    ids = plain[torch.randint(len(plain), (_SAMPLES, length), generator=generator)]
    mask = torch.ones(_SAMPLES, length, dtype=torch.long)
    mask[1, max(2, length // 2) :] = 0
    pad = special["pad"] or 0
    ids[mask == 0] = pad
    last = mask.sum(dim=1) - 1
    ids[torch.arange(_SAMPLES), last] = end
    return {"input_ids": ids, "attention_mask": mask}
