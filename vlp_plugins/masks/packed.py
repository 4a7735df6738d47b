"""Masks as bits: packing, counting, and a mapping of packed masks with their new values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from vlp_plugins.masks.apply import bytes_of_values, check_values, difference, same_values
from vlp_plugins.masks.manifest import SCHEMA, SCHEMA_WITH_VALUES, Counts, Manifest, WeightRecord
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.memory import text_of

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


class PackedMasks(Mapping[str, torch.Tensor]):
    """Canonical name -> bool mask of the weight's shape; what `Masks` is without any model.

    Args:
        packed: what `pack` returns, by canonical name.
        manifest: describes the same names; its `kept` counts are replaced by those of the bits.
        values: of methods that change what they keep: by canonical name float32 `[kept]`, in
            row-major order; None leaves the kept weights as they are.

    Raises:
        MaskError: if names or lengths differ, or values are not finite.
    """

    def __init__(
        self,
        packed: Mapping[str, torch.Tensor],
        manifest: Manifest,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        for name in (*manifest.weights, *packed):
            if name not in packed or name not in manifest.weights:
                where = "the manifest lists" if name not in packed else "there is a mask for"
                raise MaskError(f"{where} {name!r}, but the other side does not have it")
            if found := flaw(packed[name], manifest.shape(name)):
                raise MaskError(f"the mask of {name!r} {found}; make masks with pack()")
        self._packed = {name: packed[name] for name in manifest.weights}
        self.manifest = replace(
            manifest,
            weights={
                name: WeightRecord(
                    shape=record["shape"],
                    modality=record["modality"],
                    kept=count_ones(packed[name]),
                )
                for name, record in manifest.weights.items()
            },
            schema=SCHEMA if values is None else SCHEMA_WITH_VALUES,
        )
        self._values: dict[str, torch.Tensor] | None = None
        if values is not None:
            check_values(values, self.manifest)
            self._values = {name: values[name].detach().cpu() for name in manifest.weights}

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack(self._packed[name], self.manifest.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # the inherited method would unpack

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMasks):
            return NotImplemented
        return (
            not difference(self.manifest, other.manifest)
            and all(torch.equal(bits, other._packed[name]) for name, bits in self._packed.items())
            and same_values(self._values, other._values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = f", {text_of(self.values_bytes)} of new weights" if self._values else ""
        return (
            f"Masks({self.manifest.method}, {len(self)} weights, "
            f"{self.removed:,} of {self.total:,} removed = {self.sparsity:.4%}{values})"
        )

    @property
    def packed(self) -> Mapping[str, torch.Tensor]:
        """The bits themselves, uint8 1-D by canonical name; not to be modified."""
        return self._packed

    @property
    def new_values(self) -> Mapping[str, torch.Tensor] | None:
        """New values of the kept elements, float32 `[kept]` in row-major order; None without."""
        return self._values

    @property
    def values_bytes(self) -> int:
        """Bytes that the new values take, in memory and in a file."""
        return bytes_of_values(self._values or {})

    def counts(self) -> Counts:
        """Exact counts of every weight and modality."""
        return Counts.of(self.manifest)

    @property
    def kept(self) -> int:
        """Number of elements kept."""
        return self.counts().all.kept

    @property
    def total(self) -> int:
        """Number of elements."""
        return self.counts().all.total

    @property
    def removed(self) -> int:
        """Number of elements removed."""
        return self.counts().all.removed

    @property
    def sparsity(self) -> float:
        """Fraction removed, exact: removed / total."""
        return self.counts().all.sparsity
