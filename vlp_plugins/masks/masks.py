"""Masks: which elements of every weight are kept, as exact bits, with where they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vlp_plugins.masks import files
from vlp_plugins.masks.apply import (
    Violation,
    apply_masks,
    check_comparable,
    compact,
    is_source,
    match,
    violations,
    wrong_shape,
)
from vlp_plugins.masks.compare import Overlap, overlaps
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.packed import PackedMasks, clear_padding, pack
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import MaskError

_INVERTED = "inverted"


class Masks(PackedMasks):
    """Canonical name -> bool mask of the weight's shape on the CPU, True = kept.

    Masks are held as bits, an eighth of a byte per element, and unpacked on access. Two sets are
    equal if they have the same names, shapes, bits and new values, whatever made them.

    Args:
        packed: what `pack` returns, by canonical name.
        manifest: describes the same names; its `kept` counts are replaced by those of the bits.
        values: of methods that change what they keep: by canonical name float32 `[kept]`, in
            row-major order; None leaves the kept weights as they are.

    Raises:
        MaskError: if names or lengths differ, or values are not finite.
    """

    @classmethod
    def from_dense(
        cls,
        masks: Mapping[str, torch.Tensor],
        manifest: Manifest,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> Masks:
        """Packs bool tensors, and new values if there are any, of the weights' shapes.

        Raises:
            MaskError: if a mask is not bool, names or shapes differ from the manifest's, or a
                value of a kept element is not finite.
        """
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise MaskError(f"mask {name!r} is {mask.dtype}; masks are bool, True = kept")
            if name in manifest.weights and tuple(mask.shape) != manifest.shape(name):
                raise wrong_shape(name, tuple(mask.shape), manifest.shape(name))
        if values is not None:
            _same_names(values, masks)
            values = {name: compact(name, values[name], mask) for name, mask in masks.items()}
        return cls({name: pack(mask) for name, mask in masks.items()}, manifest, values)

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

    def made_from(self, weights: WeightMap) -> bool:
        """Whether the masks were made from these weights, as far as the manifest tells.

        False for a downstream model and after any training, pruning or rounding.
        """
        return is_source(self.manifest, weights)

    def apply(
        self, model: nn.Module, adapter: Adapter | None = None, *, values: bool = True
    ) -> None:
        """Zeroes the removed weights of a model and writes new values into the kept ones, if any.

        It is done in place; ties, dtypes, devices stay. A warning says if the new values were
        computed from other weights than the model has: they overwrite what it learned since.

        Args:
            model: of the structure the masks were made for, or a downstream model of the family.
            adapter: None takes the one that the masks were made with, as far as the manifest
                tells, or asks the registered adapters which one claims the model.
            values: False leaves the kept weights as they are.

        Raises:
            MaskError: if they do not fit; the model is unchanged then.
            UnclaimedModelError: without an adapter, if none claims the model.
        """
        apply_masks(self, self._values if values else None, self.manifest, model, adapter)

    def verify(self, model: nn.Module, adapter: Adapter | None = None) -> list[Violation]:
        """The weights that are not zero where their mask removes; none if really that sparse.

        Raises:
            MaskError: if the masks do not fit the model.
        """
        return violations(self, self.manifest, model, adapter)

    def compare(self, other: Masks) -> dict[str, Overlap]:
        """The overlap of two mask sets by modality, and under `"all"` of the whole.

        Raises:
            MaskError: naming the first difference if the sets are of different structures, or
                the adapters if those differ.
        """
        check_comparable(self.manifest, other.manifest)
        return overlaps(self._packed, other._packed, self.manifest)

    def invert(self) -> Masks:
        """Keeps what is removed and removes what is kept, without new values: a sanity check."""
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
        files.write(path, self._packed, self.manifest, self._values, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
            MaskError: if the file is missing, damaged, foreign or of a newer version.
        """
        return cls(*files.read(path))


def _same_names(values: Mapping[str, object], masks: Mapping[str, object]) -> None:
    for name in (*masks, *values):
        if name not in values or name not in masks:
            lacking = "new values" if name in masks else "mask"
            raise MaskError(f"there is no {lacking} for {name!r}, although the other is given")
