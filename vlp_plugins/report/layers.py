"""One row per weight: how much each mask set removes, whether a layer collapsed."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.drawing import colour, depth_axis, empty_figure, svg_of
from vlp_plugins.scoring.allocation import GlobalAllocation, LayerAllocation, Pattern, RowAllocation

_FLOORS = tuple(step * 10.0**-power for power in range(2, 7) for step in (2, 1, 0.5))
"""Floors to recommend: the first for which there is room."""
_COLLAPSED = 0.01
"""A layer that keeps less than this fraction is reported as collapsed."""


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Comma-separated text, one line per row.

    A spreadsheet runs text that begins with `=`, `+`, `-` or `@` as a formula, and names of weights
    may be anything: such cells, unless numbers, get an apostrophe in front.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _cell(cell: object) -> object:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


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


def collapse_warnings(
    rows: Sequence[LayerRow], titles: Sequence[str], masks: Sequence[Masks] = ()
) -> list[str]:
    """A sentence for every mask set that removes nothing, or all or nearly all of a layer.

    Args:
        rows: of all weights.
        titles: of the mask sets.
        masks: the sets, whose manifests record whether the method takes a floor; none: it does.
    """
    warnings = []
    for i, title in enumerate(titles):
        if rows and all(row.kept[i] == row.elements for row in rows):
            warnings.append(f"sparsity {title}: nothing is removed; the model stays dense")
        empty = [row.name for row in rows if row.kept[i] == 0]
        thin = [row.name for row in rows if row.kept[i] and row.sparsities[i] > 1 - _COLLAPSED]
        for names, what in ((empty, "removed entirely"), (thin, "all but removed (over 99 %)")):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
                remedy = _remedy(rows, i, masks[i].manifest if masks else None)
                warnings.append(
                    f"sparsity {title}: {len(names)} of {len(rows)} weights {what}: {shown}; "
                    f"{remedy}"
                )
    return warnings


def _remedy(rows: Sequence[LayerRow], i: int, manifest: Manifest | None) -> str:
    """How to keep every layer alive in the i-th mask set."""
    parameters = {"floor": 0.0} if manifest is None else manifest.parameters
    allocation = parameters.get("allocation", GlobalAllocation.name)
    if allocation in (LayerAllocation.name, RowAllocation.name, Pattern.name):
        return "every layer loses the same fraction: lower the sparsity to keep them alive"
    # Methods that take a floor record it.
    if manifest is not None and "floor" not in parameters:
        return (
            f"method {manifest.method!r} takes no floor: lower the sparsity, or take a method that "
            "does"
        )
    # Published methods have none.
    where = " in the default variant" if parameters.get("variant") == "published" else ""
    groups: dict[str, list[LayerRow]] = {}
    for row in rows:
        scope = "" if allocation == GlobalAllocation.name else row.modality
        groups.setdefault(scope, []).append(row)
    for floor in _FLOORS:
        if all(_has_room(members, i, floor) for members in groups.values()):
            return f"a floor{where} (--floor {floor:g}) keeps every layer alive"
    return "no floor leaves room for all layers at this sparsity: lower it"


def _has_room(rows: Sequence[LayerRow], i: int, floor: float) -> bool:
    """Whether the rows keep twice the floor, and one element for each that it is rounded up by."""
    kept = sum(row.kept[i] for row in rows)
    least = sum(math.ceil(floor * row.elements) for row in rows)
    return least <= kept and 2 * floor * sum(row.elements for row in rows) <= kept


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


def sparsity_by_depth(rows: Sequence[LayerRow], titles: Sequence[str]) -> str:
    """One panel per mask set: depth on x, sparsity on y, one line per modality.

    A point is the sparsity of all weights of one modality at one depth together.
    """
    figure = empty_figure(4.2 * len(titles), 2.8)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    modalities = list(dict.fromkeys(row.modality for row in rows))
    for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for place, modality in enumerate(modalities):
            depths, values = _mean_by_depth([r for r in rows if r.modality == modality], i)
            style = {"marker": "o", "markersize": 3, "color": colour(place)}
            axis.plot(depths, values, label=modality, **style)
        axis.set_title(title, fontsize=9)
        depth_axis(axis)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("sparsity")
    axes[0].legend(fontsize=8)
    return svg_of(figure)


def _mean_by_depth(rows: Sequence[LayerRow], mask: int) -> tuple[list[int], list[float]]:
    kept, total = Counter[int](), Counter[int]()
    for row in rows:
        kept[row.depth] += row.kept[mask]
        total[row.depth] += row.elements
    depths = sorted(total)
    return depths, [1 - kept[depth] / total[depth] for depth in depths]
