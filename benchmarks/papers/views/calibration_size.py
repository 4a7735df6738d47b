"""R@1 by the number of calibration pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import AVERAGE, AVERAGE_FEATURES, Measure
from benchmarks.papers.plots import Line, draw_dense, draw_lines, panels
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURES = (AVERAGE, AVERAGE_FEATURES)


def calibration_size(found: Found) -> Rendered:
    """A row per method, a column per number of pairs; a line each in the plot."""
    (sparsity,) = found.sparsities
    methods, sizes = _methods(found), _sizes(found)
    lines = [f"At {percent(sparsity)} sparsity.", ""]
    for model in found.models:
        lines += [f"## {title_of(model)}", ""]
        for measure in _MEASURES:
            rows = [
                [
                    method,
                    *(found.entry(measure, model, ways.get(n, ""), sparsity).text for n in sizes),
                ]
                for method, ways in methods.items()
            ]
            dense = found.entry(measure, model, DENSE, 0.0).text
            header = ["Method", *(f"{n:,} pairs" for n in sizes)]
            lines += [f"{measure.title} (dense: {dense}):", "", *markdown(header, rows), ""]
    figure = panels(
        [title_of(model) for model in found.models],
        [measure.title for measure in _MEASURES],
        lambda axis, i, j: _draw(found, axis, found.models[i], _MEASURES[j]),
    )
    return Rendered(lines, figure)


def _methods(found: Found) -> dict[str, dict[int, str]]:
    """By method the way of every number of pairs."""
    methods: dict[str, dict[int, str]] = {}
    for name, way in found.ways.items():
        methods.setdefault(way.method, {})[way.samples] = name
    return methods


def _sizes(found: Found) -> list[int]:
    return sorted({way.samples for way in found.ways.values()})


def _draw(found: Found, axis: Axes, model: str, measure: Measure) -> None:
    (sparsity,) = found.sparsities
    lines = {
        method: Line(
            sorted(ways),
            [found.entry(measure, model, ways[n], sparsity) for n in sorted(ways)],
        )
        for method, ways in _methods(found).items()
    }
    draw_dense(axis, found.entry(measure, model, DENSE, 0.0))
    draw_lines(axis, lines)
    axis.set_xscale("log", base=2)
    axis.set_xticks(_sizes(found), [f"{n:,}" for n in _sizes(found)])
    axis.set_xlabel("calibration pairs", fontsize=8)
    axis.set_ylim(bottom=0)
