"""Exact counts of what masks keep, from their manifest."""

from __future__ import annotations

from dataclasses import dataclass

from vlp_plugins.masks.manifest import Manifest


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
    """Counts by canonical name, by modality (both in the adapter's order), and of everything."""

    by_weight: dict[str, Count]
    by_modality: dict[str, Count]
    all: Count

    @classmethod
    def of(cls, manifest: Manifest) -> Counts:
        """The counts that a manifest records."""
        by_weight: dict[str, Count] = {}
        by_modality: dict[str, Count] = {}
        for name, record in manifest.weights.items():
            count = by_weight[name] = Count(record["kept"], manifest.numel(name))
            known = by_modality.get(record["modality"], Count(0, 0))
            by_modality[record["modality"]] = known + count
        return cls(by_weight, by_modality, sum(by_weight.values(), Count(0, 0)))
