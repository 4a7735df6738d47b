"""One row per weight: how much of it each mask set removes, and whether a layer collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlp_plugins.masks import Masks
from vlp_plugins.report.spreadsheet import csv_text
from vlp_plugins.weights import WeightMap

COLLAPSED = 0.01
"""A layer that keeps less than this fraction is reported as collapsed."""


@dataclass(frozen=True)
class LayerRow:
    """One weight; `sparsities` has one entry per mask set."""

    name: str
    modality: str
    depth: int
    shape: tuple[int, ...]
    uses: int
    sparsities: tuple[float, ...]
    kept: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def layer_rows(weights: WeightMap, masks: Sequence[Masks]) -> list[LayerRow]:
    """The rows of all weights, in the adapter's order."""
    counts = [m.counts().by_weight for m in masks]
    return [
        LayerRow(
            weight.name,
            weight.modality,
            weight.depth,
            weight.shape,
            len(weight.owners),
            tuple(count[weight.name].sparsity for count in counts),
            tuple(count[weight.name].kept for count in counts),
        )
        for weight in weights.values()
    ]


def collapse_warnings(rows: Sequence[LayerRow], titles: Sequence[str]) -> list[str]:
    """A sentence for every mask set that removes nothing, empties layers, or all but does."""
    warnings = []
    for i, title in enumerate(titles):
        if rows and all(row.kept[i] == row.elements for row in rows):
            warnings.append(f"sparsity {title}: nothing is removed; the model stays dense")
        empty = [row.name for row in rows if row.kept[i] == 0]
        thin = [row.name for row in rows if row.kept[i] and row.sparsities[i] > 1 - COLLAPSED]
        for names, what in ((empty, "removed entirely"), (thin, "all but removed (over 99 %)")):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
                warnings.append(
                    f"sparsity {title}: {len(names)} of {len(rows)} weights {what}: {shown}; a "
                    "floor (--floor 0.02) keeps every layer alive"
                )
    return warnings


def to_csv(rows: Sequence[LayerRow], titles: Sequence[str]) -> str:
    """Comma-separated text with a header; fractions with six digits."""
    columns = [f"{kind}_{title}" for title in titles for kind in ("sparsity", "kept")]
    lines: list[list[object]] = [
        ["name", "modality", "depth", "shape", "elements", "uses", *columns]
    ]
    for row in rows:
        shape = "x".join(map(str, row.shape))
        pairs = zip(row.sparsities, row.kept, strict=True)
        cells = [cell for s, kept in pairs for cell in (f"{s:.6f}", kept)]
        lines.append([row.name, row.modality, row.depth, shape, row.elements, row.uses, *cells])
    return csv_text(lines)
