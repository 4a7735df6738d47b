"""Intrinsic dimensions by modality: numbers, a sentence that compares them, rows, a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.report.drawing import Axis, Chart, Point, line_chart
from vlp_plugins.report.layers import csv_text
from vlp_plugins.report.page import Table

_ERRORS = 2.0
"""A difference counts if it is more than so many standard errors."""


@dataclass(frozen=True, slots=True)
class ModalityDimension:
    """The intrinsic dimensions of the layers of one modality.

    The errors of layers come from the same samples and may all go the same way, so they do not
    average out: the error of the mean is the mean of the errors.

    Attributes:
        layers: number of layer outputs; a layer that runs in several streams has several.
        spread_error: standard error of `spread`.
    """

    modality: str
    layers: int
    mean: float
    error: float
    lowest: float
    highest: float
    spread_error: float

    @property
    def spread(self) -> float:
        """Highest minus lowest."""
        return self.highest - self.lowest


def by_modality(layers: Sequence[LayerDimension]) -> list[ModalityDimension]:
    """One entry per modality, in order of first appearance."""
    groups: dict[str, list[LayerDimension]] = {}
    for layer in layers:
        groups.setdefault(layer.modality, []).append(layer)
    return [_modality(name, members) for name, members in groups.items()]


def _modality(name: str, members: Sequence[LayerDimension]) -> ModalityDimension:
    ordered = sorted(members, key=lambda layer: layer.dimension)
    count = len(ordered)
    return ModalityDimension(
        name,
        count,
        math.fsum(layer.dimension for layer in ordered) / count,
        math.fsum(layer.error for layer in ordered) / count,
        ordered[0].dimension,
        ordered[-1].dimension,
        math.hypot(ordered[0].error, ordered[-1].error) if count > 1 else 0.0,
    )


def dimension_sentences(layers: Sequence[LayerDimension]) -> list[str]:
    """Which modality has the highest mean ID, and which the widest range, or that none has."""
    groups = by_modality(layers)
    if len(groups) == 1:
        only = groups[0]
        return [
            f"{only.modality}: mean ID {_value(only)}, from {_range(only)}; nothing to compare."
        ]
    means = sorted(groups, key=lambda group: -group.mean)
    spreads = sorted(groups, key=lambda group: -group.spread)
    return [
        _sentence(
            "the highest mean ID",
            {group.modality: (group.mean, group.error) for group in means},
            "Mean IDs",
        ),
        _sentence(
            "the widest range of IDs",
            {group.modality: (group.spread, group.spread_error) for group in spreads},
            "Ranges (highest minus lowest; more layers, wider)",
        ),
    ]


def vision_sentences(layers: Sequence[LayerDimension]) -> list[str]:
    """Whether vision has a higher ID than text, as Wang, Zhang, Ma (ICML 2024) find.

    Empty unless the model has both.
    """
    groups = {group.modality: group for group in by_modality(layers)}
    if not {"vision", "text"} <= groups.keys():
        return []
    vision, text = groups["vision"], groups["text"]
    difference = vision.mean - text.mean
    error = math.hypot(vision.error, text.error)
    if abs(difference) <= _ERRORS * error:
        verdict = "not shown, the difference is less than two standard errors"
    else:
        verdict = "holds here" if difference > 0 else "the opposite holds here"
    return [
        f"Vision of higher ID than text: {verdict}: {_value(vision)} and {_value(text)}, "
        f"{difference:+.2f} ± {error:.2f}."
    ]


def duplicate_sentences(layers: Sequence[LayerDimension]) -> list[str]:
    """How many points equal another one, by modality; nothing if none does."""
    most: dict[str, LayerDimension] = {}
    for layer in layers:
        known = most.setdefault(layer.modality, layer)
        if layer.duplicates > known.duplicates:
            most[layer.modality] = layer
    listed = [
        f"{modality} {layer.duplicates:,} of {layer.points:,}"
        for modality, layer in most.items()
        if layer.duplicates
    ]
    if not listed:
        return []
    return [
        "Duplicates: in the layer that has most of them, so many points equal another one and are "
        f"left out: {', '.join(listed)}. Duplicate samples add no information."
    ]


def constant_sentences(profile: IdProfile) -> list[str]:
    """Which layers have no dimension, and why; nothing if all have one."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in profile.without.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"Without a dimension, because {reason}: {', '.join(names)}. Methods that go by dimensions "
        "give such a layer the mean of its modality."
        for reason, names in by_reason.items()
    ]


def _sentence(what: str, values: Mapping[str, tuple[float, float]], title: str) -> str:
    (first, (one, one_error)), (second, (other, other_error)) = list(values.items())[:2]
    listed = ", ".join(f"{name} {v:.2f} ± {error:.2f}" for name, (v, error) in values.items())
    error = math.hypot(one_error, other_error)
    if one - other > _ERRORS * error:
        verdict = f"{first} has {what}, by {one - other:.2f} ± {error:.2f} over {second}"
    else:
        verdict = (
            f"{first} has {what}, but only by {one - other:.2f} ± {error:.2f} over {second}: the "
            "difference is less than two standard errors"
        )
    return f"{verdict}. {title}: {listed}."


def layers_csv(layers: Sequence[LayerDimension]) -> str:
    """Comma-separated text, one row per layer output."""
    header = ["weight", "modality", "depth", "stream", "module", "id", "error", "ambient", "points",
              "duplicates"]  # fmt: skip
    return csv_text([
        header,
        *(
            [layer.weight, layer.modality, layer.depth, layer.stream, layer.module,
             f"{layer.dimension:.6g}", f"{layer.error:.6g}", layer.ambient, layer.points,
             layer.duplicates]
            for layer in layers
        ),
    ])  # fmt: skip


def modality_table(layers: Sequence[LayerDimension]) -> Table:
    """One row per modality."""
    return Table(
        "By modality",
        ("modality", "layers", "mean ID", "lowest", "highest"),
        [
            [g.modality, str(g.layers), _value(g), f"{g.lowest:.2f}", f"{g.highest:.2f}"]
            for g in by_modality(layers)
        ],
        "Mean over the layers' outputs, with the mean of their standard errors: all come from the "
        "same samples, so the errors do not average out.",
    )


def layer_table(layers: Sequence[LayerDimension]) -> Table:
    """One row per layer output."""
    return Table(
        "Layers",
        ("weight", "stream", "depth", "ID", "error", "ambient", "points", "duplicates"),
        [
            [layer.weight, layer.stream, str(layer.depth), f"{layer.dimension:.2f}",
             f"{layer.error:.2f}", f"{layer.ambient:,}", f"{layer.points:,}",
             f"{layer.duplicates:,}"]
            for layer in layers
        ],
    )  # fmt: skip


def dimension_by_depth(layers: Sequence[LayerDimension]) -> Chart:
    """Depth on x, ID on y; per modality the mean of the layers at a depth, with its error."""
    modalities = list(dict.fromkeys(layer.modality for layer in layers))
    lines: dict[str, list[Point]] = {}
    dots: dict[str, list[tuple[float, float]]] = {}
    for place, modality in enumerate(modalities):
        here = [layer for layer in layers if layer.modality == modality]
        aside = 0.12 * (place - (len(modalities) - 1) / 2)  # error bars must not hide each other
        dots[modality] = [(layer.depth + aside, layer.dimension) for layer in here]
        for depth in sorted({layer.depth for layer in here}):
            group = _modality("", [layer for layer in here if layer.depth == depth])
            lines.setdefault(modality, []).append((depth + aside, group.mean, group.error))
    return line_chart(
        "",
        lines,
        x=Axis("depth", whole=True),
        y=Axis("intrinsic dimension", low=0.0),
        dots=dots,
        note="Lines: mean of the layers at a depth, with its standard error. Faint dots: the "
        "layers.",
    )


def _value(group: ModalityDimension) -> str:
    return f"{group.mean:.2f} ± {group.error:.2f}"


def _range(group: ModalityDimension) -> str:
    return f"{group.lowest:.2f} to {group.highest:.2f}"
