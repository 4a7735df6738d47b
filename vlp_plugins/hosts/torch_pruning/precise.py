"""A model in half precision, in float32 for a while: there a comparison means something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlp_plugins.models.adapter import Batch

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers in half precision are float32 inside the block.

    Afterwards those that are as they were have their own values again, and those that were cut or
    rescaled are rounded once.
    """
    places = [
        (held, name, tensor.dtype)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.dtype in _HALF
    ]
    halves = {id(held[name]): held[name] for held, name, _ in places}
    before = [
        (tensor, tensor.data, tensor.grad) for tensor in halves.values() if tensor is not None
    ]
    made = []
    try:
        for tensor, data, _ in before:
            _cast(tensor, torch.float32)
            made.append((tensor, tensor.data, data))
        yield
    finally:
        for tensor, single, half in made:
            if tensor.data_ptr() == single.data_ptr() and tensor.shape == single.shape:
                tensor.grad, tensor.data = None, half
        for tensor, data, gradient in before:
            if tensor.data_ptr() == data.data_ptr():
                tensor.grad = gradient
        for held, name, dtype in places:
            now = held[name]
            if now is not None and now.dtype == torch.float32:
                _cast(now, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> None:
    gradient, tensor.grad = tensor.grad, None  # a gradient has the dtype of its tensor
    tensor.data = tensor.data.to(dtype)
    tensor.grad = None if gradient is None else gradient.to(dtype)


def float32_of(batch: Batch) -> Batch:
    """The batch, its tensors in half precision in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
        for name, value in batch.items()
    }
