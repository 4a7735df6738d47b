"""R@1 by the number of steps of fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.papers.findings import DENSE, Entry, Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import AVERAGE, AVERAGE_FEATURES, Measure
from benchmarks.papers.plots import Line, draw_lines, panels
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURES = (AVERAGE_FEATURES, AVERAGE)


def lengths(found: Found) -> Rendered:
    """A row per method, a column per number of steps; in brackets how much of dense is left."""
    (sparsity,) = found.sparsities
    lines = [f"At {percent(sparsity)} sparsity; in brackets the share of the dense model's.", ""]
    for model in found.models:
        steps = _steps(found, model)
        header = ["Method"]
        for measure in _MEASURES:
            header += [f"{measure.title}, {count} steps" for count in steps]
        rows = [
            [
                way,
                *(
                    _text(found, measure, task, model, way)
                    for measure in _MEASURES
                    for task in steps.values()
                ),
            ]
            for way in _ways(found, model)
        ]
        lines += [f"## {title_of(model)}", "", *markdown(header, rows), ""]
    figure = panels(
        [title_of(model) for model in found.models],
        [measure.title for measure in _MEASURES],
        lambda axis, i, j: _draw(found, axis, found.models[i], _MEASURES[j]),
    )
    return Rendered(lines, figure)


def _steps(found: Found, model: str) -> dict[int, str]:
    """By number of steps, in order, the task that is trained so long."""
    tunings = {task: found.tuning(model, task) for task in found.tasks}
    return dict(sorted((tuning.steps, task) for task, tuning in tunings.items() if tuning))


def _ways(found: Found, model: str) -> list[str]:
    return [DENSE, *found.at(model, found.sparsities[0])]


def _entry(found: Found, measure: Measure, task: str, model: str, way: str) -> Entry:
    sparsity = 0.0 if way == DENSE else found.sparsities[0]
    return found.entry(replace(measure, task=task), model, way, sparsity)


def _text(found: Found, measure: Measure, task: str, model: str, way: str) -> str:
    entry = _entry(found, measure, task, model, way)
    dense = _entry(found, measure, task, model, DENSE).mean
    if way == DENSE or entry.mean is None or not dense:
        return entry.text
    return f"{entry.text} ({percent(entry.mean / dense)})"


def _draw(found: Found, axis: Axes, model: str, measure: Measure) -> None:
    steps = _steps(found, model)
    lines = {
        way: Line([*steps], [_entry(found, measure, task, model, way) for task in steps.values()])
        for way in _ways(found, model)
    }
    draw_lines(axis, lines)
    axis.set_xticks([*steps])
    axis.set_xlabel("steps of fine-tuning", fontsize=8)
    axis.set_ylim(bottom=0)
