"""What each method leaves of every modality, and whether one of them collapses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import AVERAGE, AVERAGE_FEATURES
from benchmarks.papers.plots import COLOURS, draw_bars, panels
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAIR = 0.1
"""A modality that keeps less than this part of the whole model's density has collapsed."""
_TASK = "retrieval"
_SCALES = (
    "How much methods that compare all weights remove of each modality is not a finding about "
    "modalities: the towers of text and fusion start pre-training from weights three times as "
    "large as those of vision (standard deviation 0.06 and 0.02, `benchmarks/demo/families.py`), "
    "and keep much of them (cosine of the prunable weights before and after 0.70 to 0.75, vision "
    "0.31 to 0.34)."
)
Facts = Mapping[str, Any]


def modalities(found: Found) -> Rendered:
    """Percent removed by modality and method, emptied weights, collapse, R@1 beside it."""
    lines: list[str] = []
    for model in found.models:
        lines += [f"## {title_of(model)}", "", *_table(found, model), ""]
    lines += [
        f"Collapse: modalities that keep less than {percent(FAIR)} of the density of the whole "
        "model. Nearly emptied: weights (matrices) that lose more than 99%.",
        *([] if found.origins else ["", _SCALES]),
        "",
    ]
    rows = [title_of(model) for model in found.models]
    columns = [f"density at {percent(sparsity)}" for sparsity in found.sparsities]
    return Rendered(lines, panels(rows, columns, lambda *place: _draw(found, *place)))


def collapsed(facts: Collection[Facts]) -> list[str]:
    """The modalities that have collapsed, by the mean over seeds.

    Args:
        facts: `pruned` of the cells of one method, one per seed.
    """
    overall = 1 - fmean(each["sparsity"] for each in facts)
    return [name for name in _names(facts) if 1 - _removed(facts, name) < FAIR * overall]


def _table(found: Found, model: str) -> list[str]:
    names = _modalities(found, model)
    measures = (AVERAGE, AVERAGE_FEATURES)
    rows = []
    for sparsity in found.sparsities:
        for way in found.at(model, sparsity):
            facts = _facts(found, model, way, sparsity)
            removed = [f"{100 * _removed(facts, name):.1f}" if facts else "-" for name in names]
            recalls = [found.entry(each, model, way, sparsity).text for each in measures]
            rows.append([percent(sparsity), way, *removed, _emptied(facts), _flag(facts), *recalls])
    header = [*(f"{name}, % removed" for name in names), "Nearly emptied", "Collapse"]
    return markdown(["Sparsity", "Method", *header, *(each.title for each in measures)], rows)


def _facts(found: Found, model: str, way: str, sparsity: float) -> list[Facts]:
    contents = found.of(model, _TASK, way, sparsity).values()
    return [content["pruned"] for content in contents if content["pruned"]]


def _modalities(found: Found, model: str) -> list[str]:
    every = [
        facts
        for sparsity in found.sparsities
        for way in found.at(model, sparsity)
        for facts in _facts(found, model, way, sparsity)
    ]
    return _names(every)


def _names(facts: Collection[Facts]) -> list[str]:
    return list(dict.fromkeys(name for each in facts for name in each["by_modality"]))


def _removed(facts: Collection[Facts], modality: str) -> float:
    return fmean(each["by_modality"][modality] for each in facts)


def _emptied(facts: list[Facts]) -> str:
    if not facts:
        return "-"
    return f"{fmean(each['nearly_emptied'] for each in facts):g} of {facts[0]['weights']}"


def _flag(facts: list[Facts]) -> str:
    return ", ".join(collapsed(facts)) if facts else "-"


def _draw(found: Found, axis: Axes, i: int, j: int) -> None:
    model, sparsity = found.models[i], found.sparsities[j]
    ways = [way for way in found.at(model, sparsity) if way != DENSE]
    facts = {way: _facts(found, model, way, sparsity) for way in ways}
    bars = {
        name: [100 * (1 - _removed(some, name)) if some else None for some in facts.values()]
        for name in _modalities(found, model)
    }
    if bars:
        draw_bars(axis, ways, bars, COLOURS)
    axis.axhline(100 * (1 - sparsity), color="0.3", linewidth=0.8)
    axis.set_ylabel("kept, %", fontsize=8)
