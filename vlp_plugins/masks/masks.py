"""Masks: which elements of every weight are kept, as exact bits, with where they come from.

A mask file is one safetensors file, built as `runtime.artifacts` says. Every weight is a uint8
tensor under its canonical name, one bit per element in row-major order, the most significant bit
first. The header is the manifest. New values of the kept elements, if there are any, are float32
tensors under `values:` and the name; such files have format 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from vlp_plugins.masks.apply import (
    Violation,
    apply_masks,
    check_mask,
    check_values,
    compact,
    match,
    save_pruned,
    violations,
)
from vlp_plugins.masks.compare import Overlap, check_comparable, difference
from vlp_plugins.masks.manifest import SCHEMA, SCHEMA_WITH_VALUES, Counts, Manifest, WeightRecord
from vlp_plugins.masks.packed import Pruned, clear_padding, count_ones, flaw, pack, unpack
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.files import check_new
from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.numbers import count, percent

_INVERTED = "inverted"


class Masks(Mapping[str, torch.Tensor]):
    """Canonical name -> bool mask of the weight's shape on the CPU, True = kept.

    Masks are held as bits, an eighth of a byte per element, and unpacked on access. Two sets are
    equal if they have the same names, shapes, bits and new values; how they were made does not
    count.

    Example:
        masks.save("masks.safetensors")
        masks = vlp.Masks.load("masks.safetensors")
        for modality, count in masks.counts().by_modality.items():
            print(f"{modality}: {count.removed:,} of {count.total:,} elements removed")
        masks.apply(model)

    Args:
        packed: what `pack` returns, by canonical name.
        manifest: describes the same names; its `kept` counts are replaced by those of the bits.
        values: of methods that change what they keep: by canonical name float32 `[kept]`, in
            row-major order; None leaves the kept weights as they are. Views of a file stay there.

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
            if name not in packed:
                raise MaskError(f"the manifest lists {name!r}, but the mask of {name!r} is missing")
            if name not in manifest.weights:
                raise MaskError(
                    f"there is a mask for {name!r}, but {name!r} is not in its manifest"
                )
            if found := flaw(packed[name], manifest.shape(name)):
                raise MaskError(f"the mask of {name!r} {found}, which pack() makes")
        self._packed = {name: packed[name] for name in manifest.weights}
        records: dict[str, WeightRecord] = {
            name: {**record, "kept": count_ones(packed[name])}
            for name, record in manifest.weights.items()
        }
        schema = SCHEMA if values is None else SCHEMA_WITH_VALUES
        self.manifest = replace(manifest, weights=records, schema=schema)
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
        if not isinstance(other, Masks):
            return NotImplemented
        if difference(self.manifest, other.manifest) or not _equal(self._packed, other._packed):
            return False
        if self._values is None or other._values is None:
            return self._values is other._values
        return _equal(self._values, other._values)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = self.counts().all
        values = f", {text_of(self.values_bytes)} of new weights" if self._values else ""
        return (
            f"Masks({self.manifest.method}, {percent(counts.sparsity)} of "
            f"{count(counts.total)} elements removed, {len(self)} weights{values})"
        )

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
            known = name in manifest.weights
            check_mask(name, mask, manifest.shape(name) if known else tuple(mask.shape))
        if values is not None:
            if surplus := sorted(values.keys() - masks.keys()):
                raise MaskError(f"there are new values of {surplus[0]!r}, but no mask")
            values = {name: compact(name, dense, masks[name]) for name, dense in values.items()}
        return cls({name: pack(mask) for name, mask in masks.items()}, manifest, values)

    @property
    def packed(self) -> Mapping[str, torch.Tensor]:
        """The bits themselves, uint8 1-D by canonical name; not to be modified."""
        return self._packed

    @property
    def new_values(self) -> Mapping[str, torch.Tensor] | None:
        """New values of the kept elements, float32 `[kept]` in row-major order; None without.

        Of loaded masks, and of a walk by blocks, 256 MiB or more are views of a file.
        """
        return self._values

    def pruned(self, name: str, *, values: bool = True) -> Pruned:
        """What the masks make of one weight, without new values if they are not wanted."""
        new = self._values if values else None
        return Pruned(self._packed[name], None if new is None else new[name])

    @property
    def values_bytes(self) -> int:
        """Bytes that the new values take, in memory and in a file."""
        return sum(values.nbytes for values in (self._values or {}).values())

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

    @property
    def model_sparsity(self) -> float | None:
        """Fraction removed of all parameters of the model, pruned or not; None if unknown."""
        elements = self.manifest.model_elements
        return None if elements is None else self.removed / elements

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
        """Whether the masks were made from these weights, as far as the manifest says.

        False for a downstream model and after any training, pruning or rounding; true if the
        manifest has no hash of the weights and the structure is the same.
        """
        manifest = self.manifest
        if manifest.structure != weights.structure:
            return False
        return manifest.weights_hash is None or manifest.weights_hash == weights.content_hash()

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
        apply_masks(self, model, adapter, values=values)

    def save_model(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        adapter: Adapter | None = None,
        *,
        values: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Writes the folder of the pruned model; the model stays as it is.

        The safetensors files of a model on the CPU, as `vlp_plugins.load` gives it, are written
        again one tensor after the other: what does not fit into the memory is written, too.

        Example:
            masks.save_model(model, "pruned-model")

        Args:
            model: see `apply`.
            folder: a new one.
            adapter: see `apply`.
            values: see `apply`.
            overwrite: replace a folder that this function wrote.

        Raises:
            MaskError: if they do not fit.
            UnsupportedError: if the model cannot be saved.
            OutputError: if the folder exists or cannot be written, or the disk is too small.
        """
        source = str(getattr(model, "name_or_path", "")) or None
        target = Path(os.path.realpath(folder))
        save_pruned(self, model, adapter, target, source=source, values=values, overwrite=overwrite)

    def verify(self, model: nn.Module, adapter: Adapter | None = None) -> list[Violation]:
        """The weights that are not zero where their mask removes; none if really that sparse.

        Raises:
            MaskError: if the masks do not fit the model.
        """
        return violations(self, model, adapter)

    def compare(self, other: Masks) -> dict[str, Overlap]:
        """The overlap of two mask sets by modality, and under `"all"` of the whole.

        Raises:
            MaskError: naming the first difference if the sets are of different structures, or
                the adapters if those differ.
        """
        check_comparable(self.manifest, other.manifest)
        groups: dict[str, Overlap] = {}
        for name, record in self.manifest.weights.items():
            first, second = self.packed[name], other.packed[name]
            both, either = count_ones(first & second), count_ones(first | second)
            found = Overlap(both, either, self.manifest.numel(name))
            groups[record["modality"]] = groups.get(record["modality"], Overlap()) + found
        return {**groups, "all": sum(groups.values(), Overlap())}

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
        """Writes one safetensors file, whole or not at all; missing folders above it are made.

        Raises:
            OutputError: if the file exists and is not to be overwritten, or cannot be written.
        """
        check_new(path, overwrite=overwrite)
        # Files without new values stay readable by versions that know none.
        form = replace(FORMAT, schema=self.manifest.schema)
        values = {f"{_VALUES}{name}": tensor for name, tensor in (self.new_values or {}).items()}
        header = asdict(self.manifest)
        write_artifact(path, form, {**self.packed, **values}, header, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what `save` wrote; nothing in the file is executed.

        New values of 256 MiB or more stay in the file, and are read where they are used: it may be
        replaced or deleted meanwhile, but not be written in place.

        Raises:
            MaskError: if the file is missing, damaged, foreign or of a newer version.
        """
        form = FORMAT
        if Path(path).suffix in (".pth", ".pt", ".bin"):
            hint = "; `vlp masks import` reads published .pth files"
            form = replace(FORMAT, remedy=FORMAT.remedy + hint)
        tensors, header = read_artifact(path, form, mapped=_VALUES)
        try:
            manifest = Manifest.from_header(header)
            packed, values = _parted(tensors, manifest)
            try:
                masks = cls(packed, manifest, values)
                _check_counts(masks.manifest, manifest)
            except MaskError as error:
                raise MaskError(f"is damaged: {error}") from error
        except MaskError as error:
            raise MaskError(f"mask file {path} {error}; {form.remedy}") from error.__cause__
        return masks


def _equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    for name, tensor in one.items():
        if not torch.equal(tensor, two[name]):
            return False
        release((tensor, two[name]))
    return True


FORMAT = Format("mask", "vlp_masks", SCHEMA_WITH_VALUES, MaskError, "make or copy it again")
_VALUES = "values:"


def _parted(
    tensors: Mapping[str, torch.Tensor], manifest: Manifest
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Bits and new values by canonical name; files of format 1 have none."""
    if manifest.schema < SCHEMA_WITH_VALUES:
        return dict(tensors), None
    bits, values = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(_VALUES) and name not in manifest.weights:
            values[name.removeprefix(_VALUES)] = tensor
        else:
            bits[name] = tensor
    return bits, values


def _check_counts(found: Manifest, said: Manifest) -> None:
    """Raises `MaskError` at the first weight that keeps another number than was said."""
    for name, record in said.weights.items():
        if (kept := found.weights[name]["kept"]) != record["kept"]:
            raise MaskError(f"{name!r} keeps {kept} elements, its manifest says {record['kept']}")
