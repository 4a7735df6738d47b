"""Masks: which elements of every weight are kept, as exact bits, with where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from vlp_plugins import mask_files
from vlp_plugins.adapter import Adapter
from vlp_plugins.errors import MaskError
from vlp_plugins.mask_bits import clear_padding, count_ones, pack, packed_size, unpack
from vlp_plugins.mask_manifest import Manifest, WeightRecord
from vlp_plugins.weights import Weight, WeightMap

__all__ = ["Count", "Counts", "Manifest", "Masks", "Overlap", "Violation", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class Count:
    """How many of `total` elements are kept."""

    kept: int
    total: int

    @property
    def removed(self) -> int:
        """How many are not."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction removed; 0 of nothing."""
        return self.removed / self.total if self.total else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.kept + other.kept, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Counts:
    """Exact counts by canonical name, by modality (both in the adapter's order), and of all."""

    by_weight: dict[str, Count]
    by_modality: dict[str, Count]
    all: Count


@dataclass(frozen=True, slots=True)
class Violation:
    """A weight that has `revived` non-zero elements among the `removed` that its mask removes."""

    weight: str
    path: str
    revived: int
    removed: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """How alike two masks are.

    Attributes:
        differing: number of elements that only one of them keeps.
        total: number of elements.
        agreement: share of elements on which they agree.
        iou: elements that both keep over elements that at least one keeps; 1 if none keeps any.
    """

    differing: int
    total: int
    agreement: float
    iou: float


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
            _check_bits(name, packed[name], manifest)
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
                raise MaskError(_shape_message(name, mask.shape, manifest.shape(name)))
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
        return not _difference(self.manifest, other.manifest) and all(
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
        by_weight: dict[str, Count] = {}
        by_modality: dict[str, Count] = {}
        for name, record in self.manifest.weights.items():
            count = by_weight[name] = Count(record["kept"], self.manifest.numel(name))
            known = by_modality.get(record["modality"], Count(0, 0))
            by_modality[record["modality"]] = known + count
        return Counts(by_weight, by_modality, sum(by_modality.values(), Count(0, 0)))

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
        Masks that no weight uses are fine: a downstream model may lack a decoder.

        Raises:
            MaskError: naming the first weight without a mask or with one of another shape.
        """
        return {name: self._mask_for(weight) for name, weight in weights.items()}

    def _mask_for(self, weight: Weight) -> str:
        name = weight.name if weight.name in self else weight.copy_of
        if name is None or name not in self:
            raise MaskError(
                f"these masks (adapter {self.manifest.adapter!r}) have none for "
                f"{weight.name!r} {list(weight.shape)}, which the model has at "
                f"{weight.aliases[0]}; use masks made for a model of this structure"
            )
        if self.manifest.shape(name) != weight.shape:
            raise MaskError(_shape_message(name, self.manifest.shape(name), weight.shape))
        return name

    def apply(self, model: nn.Module, adapter: Adapter | None = None) -> None:
        """Sets the removed weights of a model to zero, in place; ties, dtypes, devices stay.

        Args:
            model: of the structure the masks were made for, or a downstream model of the family.
            adapter: None asks the registered adapters which one claims the model.

        Raises:
            MaskError: if they do not fit; the model is unchanged then.
        """
        for weight, mask in self._pairs(model, adapter):
            # Filling, not multiplying: no negative zeros, and no NaN where a weight is infinite.
            with torch.no_grad():
                weight.parameter.masked_fill_(~mask, 0)

    def verify(self, model: nn.Module, adapter: Adapter | None = None) -> list[Violation]:
        """The weights that are not zero where their mask removes; none if really that sparse.

        Raises:
            MaskError: if the masks do not fit the model.
        """
        violations = []
        for weight, mask in self._pairs(model, adapter):
            revived = int(torch.count_nonzero(weight.parameter.detach().masked_fill(mask, 0)))
            if revived:
                removed = int(mask.numel() - mask.sum())
                violations.append(Violation(weight.name, weight.aliases[0], revived, removed))
        return violations

    def _pairs(
        self, model: nn.Module, adapter: Adapter | None
    ) -> Iterator[tuple[Weight, torch.Tensor]]:
        """Every weight with its mask on its device, after all of them have been checked."""
        if adapter is None:
            from vlp_plugins.plugins import registry  # a default; masks know no plug-ins otherwise

            adapter = registry().adapter_for(model)
        weights = WeightMap.of(model, adapter)
        matched = self.match(weights)
        for weight in weights.values():
            if weight.parameter.is_meta:
                raise MaskError(f"{weight.aliases[0]} has no values yet (meta device); load it")
        for name, weight in weights.items():
            yield weight, self[matched[name]].to(weight.parameter.device)

    def compare(self, other: Masks) -> dict[str, Overlap]:
        """The overlap of two mask sets by modality, and under `"all"` of the whole.

        Raises:
            MaskError: naming the first difference if the sets are of different structures.
        """
        if difference := _difference(self.manifest, other.manifest):
            raise MaskError(f"masks of different structures cannot be compared: {difference}")
        sums: dict[str, list[int]] = {}
        for name, mine in self._packed.items():
            theirs = other._packed[name]
            both, either = count_ones(mine & theirs), count_ones(mine | theirs)
            for group in (self.manifest.weights[name]["modality"], "all"):
                known = sums.setdefault(group, [0, 0, 0])
                for i, value in enumerate((both, either, self.manifest.numel(name))):
                    known[i] += value
        sums["all"] = sums.pop("all", [0, 0, 0])  # last
        return {
            group: Overlap(
                differing=either - both,
                total=total,
                agreement=1 - (either - both) / total if total else 1.0,
                iou=both / either if either else 1.0,
            )
            for group, (both, either, total) in sums.items()
        }

    def invert(self) -> Masks:
        """Keeps what is removed and removes what is kept: a sanity check of a method."""
        notes = [*filter(None, [self.manifest.note]), "inverted"]
        if self.manifest.note is not None and self.manifest.note.endswith("inverted"):
            notes = [self.manifest.note.removesuffix("inverted").removesuffix("; ")]
        manifest = replace(self.manifest, note="; ".join(notes) or None)
        return Masks(
            {
                name: clear_padding(~bits, manifest.numel(name))
                for name, bits in self._packed.items()
            },
            manifest,
        )

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes one safetensors file; see `mask_files` for the format.

        Raises:
            OutputError: if the file exists and is not to be overwritten, or cannot be written.
        """
        mask_files.write(path, self._packed, self.manifest, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
            MaskError: if the file is missing, damaged, foreign or of a newer version.
        """
        return cls(*mask_files.read(path))


def _check_bits(name: str, bits: torch.Tensor, manifest: Manifest) -> None:
    size = packed_size(manifest.numel(name))
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (size,):
        raise MaskError(
            f"the bits of {name!r} are {bits.dtype} {list(bits.shape)}, but shape "
            f"{list(manifest.shape(name))} needs torch.uint8 [{size}]"
        )
    if not torch.equal(bits[-1:], clear_padding(bits[-1:], manifest.numel(name))):
        raise MaskError(f"{name!r} has bits set beyond its {manifest.numel(name)} elements")


def _difference(one: Manifest, two: Manifest) -> str | None:
    """The first name or shape in which two manifests differ; the order does not matter."""
    for name in (*one.weights, *two.weights):
        if name not in one.weights or name not in two.weights:
            return f"only the {'second' if name in two.weights else 'first'} has {name!r}"
        if one.shape(name) != two.shape(name):
            return f"{name!r} is {list(one.shape(name))} in one, {list(two.shape(name))} in other"
    return None


def _shape_message(name: str, mask: tuple[int, ...], weight: tuple[int, ...]) -> str:
    return (
        f"the mask of {name!r} is {list(mask)}, but the weight is {list(weight)}; "
        "use masks made for a model of this structure"
    )
