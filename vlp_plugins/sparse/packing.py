"""A sparse tensor as one bit per element and the elements that are not zero. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlp_plugins.masks.bits import count_ones, flaw, pack, packed_size, unpack

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_bits(tensor: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Which elements have to be stored for the tensor to come back bit by bit.

    Args:
        tensor: of any floating dtype. A negative zero is no zero here.
        mask: bool of its shape; what it keeps is stored even where it is zero.

    Returns:
        As `masks.bits.pack` makes them, uint8 `[ceil(numel / 8)]`.
    """
    nonzero = tensor.detach().cpu().view(_BITS[tensor.element_size()]) != 0
    return pack(nonzero if mask is None else nonzero | mask.cpu())


def kept_values(tensor: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The elements at the set bits, `[kept]` on the CPU in row-major order, of the same dtype."""
    return tensor.detach().cpu()[unpack(bits, tensor.shape)]


def unpacked(bits: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `kept_bits` and `kept_values`: of the values' dtype, zero where no bit is set."""
    dense = torch.zeros(tuple(shape), dtype=values.dtype, device=values.device)
    dense[unpack(bits, shape)] = values
    return dense


def packed_bytes(tensor: torch.Tensor, bits: torch.Tensor) -> int:
    """Bytes of bits and values.

    Of a tensor of sparsity s with w bits per element it is the share `(1 - s) + 1 / w`.
    """
    return packed_size(tensor.numel()) + count_ones(bits) * tensor.element_size()


def mismatch(bits: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> str | None:
    """What keeps bits and values from being a tensor of that shape; None if they can be."""
    if found := flaw(bits, shape):
        return f"its bits: {found}"
    kept = count_ones(bits)
    if tuple(values.shape) != (kept,):
        return f"it has {list(values.shape)} values for {kept} of {math.prod(shape)} elements"
    return None
