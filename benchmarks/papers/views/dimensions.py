"""With and without the intrinsic dimension, and whether the difference says something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.papers.comparing import margin
from benchmarks.papers.findings import Entry, Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import AVERAGE, AVERAGE_FEATURES, Measure
from benchmarks.papers.plots import COLOURS, draw_bars, panels
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ARMS = {"plain": "", "id factor": "id-factor-", "id budgets": "id-budgets-"}
_MEASURES = (AVERAGE, AVERAGE_FEATURES)


def dimensions(found: Found) -> Rendered:
    """Per method the plain figure, those with dimensions, and the differences."""
    lines: list[str] = []
    for model in found.models:
        lines += [f"## {title_of(model)}", ""]
        for measure in _MEASURES:
            lines += [f"{measure.title}:", "", *_table(found, model, measure), ""]
    lines += [
        "Differences are to the plain method with the same seed; `=` is within two standard errors "
        "of the difference, as of independent queries and seeds.",
        "",
    ]
    return Rendered(lines, panels(*_titles(found), lambda *place: _draw(found, *place)))


def difference(plain: Entry, other: Entry, queries: int) -> str:
    """Other minus plain in points, over the seeds that both have, and what it amounts to."""
    found = margin(plain, other, queries)
    return "-" if found is None else f"{found.points:+.1f}{'' if found.beyond else ' ='}"


def _bases(found: Found) -> list[str]:
    return [way for way in found.ways if f"id-factor-{way}" in found.ways]


def _table(found: Found, model: str, measure: Measure) -> list[str]:
    queries = found.queries(model)
    rows = []
    for sparsity in found.sparsities:
        for base in _bases(found):
            entries = [
                found.entry(measure, model, f"{prefix}{base}", sparsity)
                for prefix in _ARMS.values()
            ]
            gains = [difference(entries[0], entry, queries) for entry in entries[1:]]
            rows.append([percent(sparsity), base, *(each.text for each in entries), *gains])
    names = list(_ARMS)
    return markdown(
        ["Sparsity", "Method", *names, *(f"{name} - plain" for name in names[1:])], rows
    )


def _titles(found: Found) -> tuple[list[str], list[str]]:
    columns = [
        f"{percent(sparsity)}, {measure.title.removeprefix('Average ')}"
        for sparsity in found.sparsities
        for measure in _MEASURES
    ]
    return [title_of(model) for model in found.models], columns


def _draw(found: Found, axis: Axes, i: int, j: int) -> None:
    sparsity, measure = found.sparsities[j // len(_MEASURES)], _MEASURES[j % len(_MEASURES)]
    bars = {
        arm: [
            found.entry(measure, found.models[i], f"{prefix}{base}", sparsity).mean
            for base in _bases(found)
        ]
        for arm, prefix in _ARMS.items()
    }
    draw_bars(axis, _bases(found), bars, ("0.6", *COLOURS))
