"""The self-check of structured pruning: outputs before and after, on made-up inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import StructureError, UnsupportedError
from vlp_plugins.runtime.model_state import callers_defaults, flags_kept, neutral_state, takes_model
from vlp_plugins.runtime.offload import device_of

_SAMPLES = 2
_TOKENS = 8
_LEGACY_END = 2  # an end token that means "the highest id of the text" to transformers' CLIP


@neutral_state()
@takes_model
def example_batch(model: nn.Module, adapter: Adapter) -> Batch:
    """Two made-up samples of what the model's towers read; the second text is shorter and padded.

    For tracing, and for comparing two models of one configuration, which alone decides the values.

    Raises:
        UnsupportedError: if the configuration has neither a size of images nor a vocabulary.
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
    device, dtype = device_of(model), next(model.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
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


@torch.no_grad()
@takes_model
def outputs(model: nn.Module, adapter: Adapter, batch: Batch) -> dict[str, Tensor]:
    """What each stream of a model gives out, in evaluation mode; training flags are restored.

    The model gets a copy of the batch on its device.

    Returns:
        By name of the stream its tensor; of several tensors by `stream.name`.

    Raises:
        BatchError: if the batch lacks an input.
        StructureError: if no stream returns a tensor.
    """
    batch = to_device(batch, device_of(model))
    with flags_kept(model), callers_defaults(model):
        model.eval()
        found = {
            name: tensor
            for stream in adapter.streams(model, batch)
            for name, tensor in _tensors(stream.name, stream.run())
        }
    if not found:
        raise StructureError(
            f"no stream of adapter {adapter.name!r} returns a tensor, so models cannot be "
            "compared; let Stream.run return what that part of the model gives out"
        )
    return found


def check_equal(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Checks that two models gave the same `outputs` for one batch.

    The tolerance is in units of the largest absolute value that was expected of a stream.

    Raises:
        StructureError: naming the first stream that differs, and by how much.
    """
    if expected.keys() != found.keys():
        raise StructureError(f"streams {sorted(expected)} were expected, found {sorted(found)}")
    for name, wanted in expected.items():
        if wanted.shape != found[name].shape:
            raise StructureError(
                f"stream {name!r} is {list(found[name].shape)}, not {list(wanted.shape)}"
            )
        error = relative_error(wanted, found[name])
        if not error <= tolerance:  # NaN is not either
            raise StructureError(
                f"the cut model computes something else: stream {name!r} differs from that of the "
                f"uncut model with the same rows and columns at zero by {error:.1e} of its largest "
                f"value (allowed: {tolerance:.0e}); attributes such as the size of heads may not "
                "fit its layers, call patch(model, adapter)"
            )


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; NaN if there is one."""
    if not expected.numel():
        return 0.0
    wanted = expected.double()
    error = (found.to(wanted) - wanted).abs().amax()
    largest = wanted.abs().amax()
    return float(error / largest if largest else error)


def _tensors(name: str, returned: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(returned, Tensor):
        yield name, returned
        return
    items: Iterable[tuple[object, object]] = ()
    if isinstance(returned, Mapping):
        items = returned.items()
    elif isinstance(returned, list | tuple):
        items = enumerate(returned)
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
