"""Masks: which elements of every weight are kept, as exact bits, with where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.errors import MaskError
from vlp_plugins.masks import files
from vlp_plugins.masks.bits import clear_padding, count_ones, flaw, pack, unpack
from vlp_plugins.masks.counts import Counts
from vlp_plugins.masks.fitting import Violation, difference, match, pairs, wrong_shape
from vlp_plugins.masks.manifest import Manifest, WeightRecord
from vlp_plugins.masks.overlap import Overlap, overlaps
from vlp_plugins.weights import WeightMap

_INVERTED = "inverted"


class Masks(Mapping[str, torch.Tensor]):
    """Canonical name -> bool mask of the weight's shape on the CPU, True = kept.

    Masks are held as bits, an eighth of a byte per element, and unpacked on access. Two sets are
    equal if they have the same names, shapes and bits, whatever made them.

    Args:
        packed: what `pack` returns, by canonical name.
        manifest: describes the same names; its `kept` counts are replaced by those of the bits.

    Raises:
        MaskError: if names or lengths of the two differ.
    """

    def __init__(self, packed: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
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
        )

    @classmethod
    def from_dense(cls, masks: Mapping[str, torch.Tensor], manifest: Manifest) -> Masks:
        """Packs bool tensors of the weights' shapes.

        Raises:
            MaskError: if a mask is not bool, or names or shapes differ from the manifest's.
        """
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise MaskError(f"mask {name!r} is {mask.dtype}; masks are bool, True = kept")
            if name in manifest.weights and tuple(mask.shape) != manifest.shape(name):
                raise wrong_shape(name, tuple(mask.shape), manifest.shape(name))
        return cls({name: pack(mask) for name, mask in masks.items()}, manifest)

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack(self._packed[name], self.manifest.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # the inherited method would unpack

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return not difference(self.manifest, other.manifest) and all(
            torch.equal(bits, other._packed[name]) for name, bits in self._packed.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Masks({self.manifest.method}, {len(self)} weights, "
            f"{self.removed:,} of {self.total:,} removed = {self.sparsity:.4%})"
        )

    @property
    def packed(self) -> Mapping[str, torch.Tensor]:
        """The bits themselves, uint8 1-D by canonical name; not to be modified."""
        return self._packed

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

    def match(self, weights: WeightMap) -> dict[str, str]:
        """For every weight of a model the name of its mask.

        A weight without a mask of its own that is a copy has the mask of what it was copied from.
        Masks that no weight uses are fine if the model lacks their whole kind: a downstream model
        may have no decoder, but not fewer layers.

        Raises:
            MaskError: if the adapters differ, or naming the first weight without a mask or with
                one of another shape, or the first mask of a layer that the model lacks.
        """
        return match(self.manifest, weights)

    def apply(self, model: nn.Module, adapter: Adapter | None = None) -> None:
        """Sets the removed weights of a model to zero, in place; ties, dtypes, devices stay.

        Args:
            model: of the structure the masks were made for, or a downstream model of the family.
            adapter: None takes the one that the masks were made with, as far as the manifest
                tells, or asks the registered adapters which one claims the model.

        Raises:
            MaskError: if they do not fit; the model is unchanged then.
            UnclaimedModelError: without an adapter, if none claims the model.
        """
        for weight, mask in pairs(self, self.manifest, model, adapter):
            # Filling, not multiplying: no negative zeros, and no NaN where a weight is infinite.
            with torch.no_grad():
                weight.parameter.masked_fill_(~mask, 0)

    def verify(self, model: nn.Module, adapter: Adapter | None = None) -> list[Violation]:
        """The weights that are not zero where their mask removes; none if really that sparse.

        Raises:
            MaskError: if the masks do not fit the model.
        """
        violations = []
        for weight, mask in pairs(self, self.manifest, model, adapter):
            revived = int(torch.count_nonzero(weight.parameter.detach().masked_fill(mask, 0)))
            if revived:
                removed = int(mask.numel() - mask.sum())
                violations.append(Violation(weight.name, weight.aliases[0], revived, removed))
        return violations

    def compare(self, other: Masks) -> dict[str, Overlap]:
        """The overlap of two mask sets by modality, and under `"all"` of the whole.

        Raises:
            MaskError: naming the first difference if the sets are of different structures.
        """
        if found := difference(self.manifest, other.manifest):
            raise MaskError(f"masks of different structures cannot be compared: {found}")
        return overlaps(self._packed, other._packed, self.manifest)

    def invert(self) -> Masks:
        """Keeps what is removed and removes what is kept: a sanity check of a method."""
        parts = self.manifest.note.split("; ") if self.manifest.note else []
        parts = parts[:-1] if parts[-1:] == [_INVERTED] else [*parts, _INVERTED]
        bits = {
            name: clear_padding(~bits, self.manifest.numel(name))
            for name, bits in self._packed.items()
        }
        return Masks(bits, replace(self.manifest, note="; ".join(parts) or None))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes one safetensors file; see `masks.files` for the format.

        Raises:
            OutputError: if the file exists and is not to be overwritten, or cannot be written.
        """
        files.write(path, self._packed, self.manifest, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
            MaskError: if the file is missing, damaged, foreign or of a newer version.
        """
        return cls(*files.read(path))
