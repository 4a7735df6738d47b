"""Curves of loss and retrieval over sparsity, and prunability beside the ID, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlp_plugins.report.drawing import colour, empty_figure, svg_of
from vlp_plugins.sensitivity.curves import Curve, Point, Sensitivity
from vlp_plugins.sensitivity.groups import Group
from vlp_plugins.sensitivity.prunability import Prunability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.4, 3.1


def curves_chart(found: Sensitivity, curves: Sequence[Curve]) -> str:
    """One line per curve: loss over the dense loss, and R@1 if it was measured.

    Points whose loss is not finite are left out. Error bars are standard errors over the batches.
    """
    recalls = found.dense.recall is not None
    figure = empty_figure(_WIDTH * (1 + recalls), _HEIGHT)
    axes = figure.subplots(1, 1 + recalls, squeeze=False)[0]
    for place, curve in enumerate(curves):
        style: dict[str, Any] = {"label": curve.group.title, "color": colour(place), "marker": "o",
                 "markersize": 3, "linewidth": 1.3, "linestyle": _dashes(place)}  # fmt: skip
        points = [found.dense, *curve.points]
        _line(axes[0], points, lambda p: 1 + p.rise(found.dense), found.dense, **style)
        if recalls:
            axes[1].plot([p.sparsity for p in points], [p.recall for p in points], **style)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("loss / dense loss")
    if recalls:
        axes[1].set_ylabel("R@1, mean of both ways (%)")
        axes[1].set_ylim(-2, 102)
    for axis in axes:
        axis.set_xlabel("sparsity of the group")
        axis.grid(alpha=0.3, which="both" if axis is axes[0] else "major")
    axes[0].legend(fontsize=8)
    return svg_of(figure)


def relation_chart(prunabilities: Sequence[Prunability], dimensions: Mapping[Group, float]) -> str:
    """ID on x, prunability by the loss on y, one dot per group, coloured by modality."""
    figure = empty_figure(_WIDTH * 1.3, _HEIGHT * 1.1)
    axis = figure.subplots()
    modalities = dict.fromkeys(p.group.modality for p in prunabilities)
    for place, modality in enumerate(modalities):
        here = [p for p in prunabilities if p.group.modality == modality]
        axis.errorbar(
            [dimensions[p.group] for p in here], [p.loss for p in here],
            yerr=[p.error or 0.0 for p in here], label=modality, color=colour(place),
            linestyle="none", marker="o", markersize=4, elinewidth=0.8,
        )  # fmt: skip
    axis.set_xlabel("intrinsic dimension (mean of the layers)")
    axis.set_ylabel("prunability by the loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return svg_of(figure)


def _line(
    axis: Axes,
    points: Sequence[Point],
    value: Callable[[Point], float],
    dense: Point,
    **style: Any,
) -> None:
    usable = [point for point in points if math.isfinite(value(point)) and value(point) > 0]
    axis.errorbar(
        [point.sparsity for point in usable],
        [value(point) for point in usable],
        yerr=[point.rise_error(dense) or 0.0 for point in usable],
        capsize=2,
        **style,
    )


def _dashes(place: int) -> str:
    """Colours begin anew after seven lines; dashes tell those beyond from those before."""
    return ("-", "--", ":", "-.")[place // 7 % 4]
