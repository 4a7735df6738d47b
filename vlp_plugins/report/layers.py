"""One row per weight: how much each mask set removes, whether a layer collapsed."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import packed_size
from vlp_plugins.models.inspection import Inspection
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.drawing import HeatMap
from vlp_plugins.report.page import FileLink, Section, Table, value_text
from vlp_plugins.runtime.numbers import count, percent, size
from vlp_plugins.scoring.allocation import GlobalAllocation, LayerAllocation, Pattern, RowAllocation

_FLOORS = tuple(step * 10.0**-power for power in range(2, 7) for step in (2, 1, 0.5))
"""Floors to recommend: the first for which there is room."""
_SHOWN = 2000
"""Rows of a page's table of weights: models of many experts have ten times as many."""
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
    counted = [m.counts().by_weight for m in masks]
    return [
        LayerRow(
            weight.name,
            weight.modality,
            weight.depth,
            weight.shape,
            len(weight.owners),
            tuple(each[weight.name].sparsity for each in counted),
            tuple(each[weight.name].kept for each in counted),
        )
        for weight in weights.values()
    ]


def collapse_warnings(
    rows: Sequence[LayerRow], titles: Sequence[str], masks: Sequence[Masks] = ()
) -> list[str]:
    """A sentence for every mask set that removes nothing, or all or nearly all of a layer.

    The manifests of `masks` record whether the method takes a floor; without them it does.
    """
    warnings = []
    for i, title in enumerate(titles):
        if rows and all(row.kept[i] == row.elements for row in rows):
            warnings.append(f"sparsity {title}: nothing is removed; the model stays dense")
        empty = [row.name for row in rows if row.kept[i] == 0]
        thin = [row.name for row in rows if row.kept[i] and row.sparsities[i] > 1 - _COLLAPSED]
        for names, what in ((empty, "removed entirely"), (thin, "all but removed (over 99%)")):
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


def layer_table(rows: Sequence[LayerRow], titles: Sequence[str]) -> Table:
    """One row per weight, one column of sparsities per mask set; of many weights the first."""
    left = f" The other {len(rows) - _SHOWN:,} are in layers.csv." if len(rows) > _SHOWN else ""
    return Table(
        "",
        ("weight", "modality", "depth", "shape", "uses", *titles),
        [
            [row.name, row.modality, str(row.depth), " x ".join(map(str, row.shape)),
             str(row.uses), *map(percent, row.sparsities)]
            for row in rows[:_SHOWN]
        ],
        f"Uses: how many modules share the weight.{left}",
    )  # fmt: skip


def excluded_table(inspection: Inspection) -> Table:
    """What is not pruned, and why."""
    return Table(
        "",
        ("reason", "tensors", "elements", "for example"),
        [
            [each.reason, str(each.tensors), count(each.elements), each.example]
            for each in inspection.excluded
        ],
    )


def heat_maps(rows: Sequence[LayerRow], place: int) -> list[HeatMap]:
    """Sparsity per layer and kind of weight in one of the mask sets, one map per modality."""
    maps = []
    for modality in dict.fromkeys(row.modality for row in rows):
        here = [row for row in rows if row.modality == modality]
        kinds = list(dict.fromkeys(kind_of(row) for row in here))
        kept, total = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
        for row in here:
            kept[row.depth, kind_of(row)] += row.kept[place]
            total[row.depth, kind_of(row)] += row.elements
        cells = [
            (
                str(depth),
                [
                    1 - kept[depth, kind] / total[depth, kind] if total[depth, kind] else None
                    for kind in kinds
                ],
            )
            for depth in sorted({row.depth for row in here})
        ]
        maps.append(HeatMap(modality, "depth", kinds, cells))
    return maps


def kind_of(row: LayerRow) -> str:
    """What a weight is in its layer: `vision.3.attention.query` is `attention.query`.

    The name without what leads to the number of the layer, and without further numbers (experts).
    """
    words = row.name.removesuffix(".weight").split(".")
    numbered = [place for place, word in enumerate(words) if word.isdigit()]
    words = words[numbered[0] + 1 :] if numbered else words[-2:]
    return ".".join(word for word in words if not word.isdigit()) or row.modality


def pruned_sections(inspection: Inspection, masks: Mapping[str, Masks]) -> list[Section]:
    """What the masks of one run, by title, remove, in all and by layer; what is not pruned."""
    titles = list(masks)
    rows = layer_rows(inspection.weights, list(masks.values()))
    highest = max(titles, key=lambda title: masks[title].sparsity)
    maps = [
        Section(
            f"Sparsity per layer and kind of weight, {percent(masks[title].sparsity)} in all",
            "The fraction of each weight that is removed; the stronger the colour, the more.",
            maps=heat_maps(rows, place),
            folded=title != highest,
        )
        for place, title in enumerate(titles)
    ]
    dense = count(inspection.parameters - inspection.prunable)
    return [
        Section("Masks", tables=[masks_table(inspection, masks)]),
        *sorted(maps, key=lambda section: section.folded),
        Section(
            f"Sparsity of each of the {len(rows)} weights",
            tables=[layer_table(rows, titles)],
            folded=True,
        ),
        Section(
            f"What is not pruned ({dense} of {count(inspection.parameters)} parameters), and why",
            tables=[excluded_table(inspection)],
            folded=True,
        ),
    ]


def masks_table(inspection: Inspection, masks: Mapping[str, Masks]) -> Table:
    """One row per mask set: its sparsity, of the whole model and by modality, and sizes."""
    modalities = [group.modality for group in inspection.groups]
    rows = []
    for title, each in masks.items():
        counts = each.counts()
        by_modality = [counts.by_modality[name] for name in modalities]
        rows.append(
            [
                FileLink(f"masks-{title}.safetensors"),
                percent(counts.all.sparsity),
                percent(each.removed / inspection.parameters),
                *(percent(found.sparsity) for found in by_modality),
                f"{counts.all.kept:,} of {counts.all.total:,}",
            ]
        )
    header = ("file", "prunable part", "whole model", *modalities, "weights kept")
    return Table("", header, rows, "Sparsity: the fraction that is removed.")


def whole_sparsity(model: nn.Module, weights: WeightMap, masks: Masks) -> float:
    """The fraction of all parameters of a model, each shared one counted once, that masks remove.

    A model that copied weights since (a decoder from the encoder) loses them in both places.
    """
    counts = masks.counts().by_weight
    removed = sum(counts[name].removed for name in masks.match(weights).values())
    return removed / sum(parameter.numel() for parameter in model.parameters())


def sparse_bytes(weights: WeightMap, masks: Masks, dense: int) -> int:
    """Bytes of a sparse checkpoint (`vlp masks apply --sparse`) that would take `dense` bytes."""
    counts, matched = masks.counts().by_weight, masks.match(weights)
    for name, weight in weights.items():
        each = weight.parameter.element_size()
        packed = packed_size(weight.numel) + counts[matched[name]].kept * each
        dense -= max(0, weight.numel * each - packed)
    return dense


def parameters_table(masks: Mapping[str, Masks]) -> Table:
    """The parameters that the manifests record, one column per mask set; last, new weights."""
    recorded = [each.manifest.parameters for each in masks.values()]
    names = dict.fromkeys(name for parameters in recorded for name in parameters)
    rows = [
        [name, *(value_text(each[name]) if name in each else "" for each in recorded)]
        for name in names
    ]
    if any(each.new_values is not None for each in masks.values()):
        rows.append(["new weights", *map(_new_weights, masks.values())])
    if all(len(set(row[1:])) == 1 for row in rows):
        return Table("", ("parameter", "value"), [row[:2] for row in rows])
    return Table("", ("parameter", *masks), rows)


def _new_weights(masks: Masks) -> str:
    if masks.new_values is None:
        return "none"
    return f"of the {masks.kept:,} kept elements, {size(masks.values_bytes)}"
