"""Masks as bits: packing, unpacking, counting; and what was decided of one weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.sharding import write_kept, zero_outside

_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)  # by byte value


def pack(mask: torch.Tensor) -> torch.Tensor:
    """One bit per element, in row-major order, the most significant bit of a byte first.

    Args:
        mask: bool, any shape, any device.

    Returns:
        uint8 `[ceil(numel / 8)]` on the CPU; the unused bits of the last byte are zero.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is bool (True = kept), not {mask.dtype}")
    return torch.from_numpy(np.packbits(mask.detach().flatten().cpu().numpy()))


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `pack`: bool on the CPU, of the given shape."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


@dataclass(frozen=True)
class Pruned:
    """What a method decided of one weight.

    Attributes:
        bits: of its mask, see `pack`.
        values: float32 `[kept]` on the CPU, what stays, in row-major order; None: as it was.
            Those of large models are views of a file.
    """

    bits: torch.Tensor
    values: torch.Tensor | None = None

    def write(self, parameter: torch.Tensor) -> None:
        """Prunes a parameter in place; see `zero_outside` and `write_kept`."""
        mask = unpack(self.bits, parameter.shape).to(parameter.device)
        zero_outside(parameter, mask)
        if self.values is not None:
            write_kept(parameter, mask, self.values)
            release((self.values,))


def packed_size(numel: int) -> int:
    """Bytes that `numel` bits take."""
    return -(-numel // 8)


def count_ones(packed: torch.Tensor) -> int:
    """Number of bits that are set."""
    return int(_ONES[packed.numpy()].sum(dtype=np.int64))


def clear_padding(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """A copy in which the unused bits of the last byte are zero."""
    packed = packed.clone()
    if used := numel % 8:
        packed[-1] &= (0xFF << (8 - used)) & 0xFF
    return packed


def flaw(packed: torch.Tensor, shape: Sequence[int]) -> str | None:
    """What keeps a tensor from being the bits of a mask of that shape; None if it can be."""
    numel = math.prod(shape)
    size = packed_size(numel)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        found = f"{packed.dtype} {list(packed.shape)}"
        return f"is {found} instead of torch.uint8 [{size}] for shape {list(shape)}"
    if not torch.equal(packed[-1:], clear_padding(packed[-1:], numel)):
        return f"has bits set beyond its {numel} elements"
    return None
