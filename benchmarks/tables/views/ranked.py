"""Ways to prune by their retrieval over all models and sparsities: what a search ends in."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.tables.findings import Entry, Found
from benchmarks.tables.layout import bold, markdown, percent, title_of, with_best
from benchmarks.tables.measures import AVERAGE, AVERAGE_FEATURES, Measure
from benchmarks.tables.views.view import Rendered
from benchmarks.tables.ways import MORE, PAPER

_PUBLISHED = {way.name for way in (*PAPER, *MORE)} - {"lamp-tamt"}
_HIGH = 0.9


def ranked(found: Found) -> Rendered:
    """A row per way, by its mean over all columns; those with fewer columns below."""
    columns = [
        (model, sparsity) for sparsity in reversed(found.sparsities) for model in found.models
    ]
    lines = [
        "Average R@1 by the features alone, which ways are chosen by; below it that after "
        "re-ranking. Published methods are in italics.",
        "",
    ]
    for measure in (AVERAGE_FEATURES, AVERAGE):
        lines += [f"{measure.title}:", "", *_table(found, measure, columns), ""]
    return Rendered([*lines, *_ahead(found)])


def _table(found: Found, measure: Measure, columns: Sequence[tuple[str, float]]) -> list[str]:
    entries = {
        way: [found.entry(measure, model, way, sparsity) for model, sparsity in columns]
        for way in found.ways
    }
    order = sorted(entries, key=lambda way: (_asked(entries[way]), _mean(entries[way]) or 0.0))
    order.reverse()
    texts = [with_best([entries[way][i] for way in order]) for i in range(len(columns))]
    rows = []
    for i, way in enumerate(order):
        mean = _mean(entries[way])
        name = f"*{way}*" if way in _PUBLISHED else way
        rows.append([name, *(text[i] for text in texts), "" if mean is None else f"{mean:.1f}"])
    header = [f"{title_of(model)} {percent(sparsity)}" for model, sparsity in columns]
    return markdown(["Method", *header, "Mean"], rows)


def _asked(entries: Sequence[Entry]) -> int:
    return sum(entry.asked > 0 for entry in entries)


def _mean(entries: Sequence[Entry]) -> float | None:
    """Over the columns that a way has; one that has not converged counts as 0."""
    if any(entry.asked and not entry.there for entry in entries):
        return None
    return fmean(entry.mean or 0.0 for entry in entries if entry.asked)


def _ahead(found: Found) -> list[str]:
    """Which ways are ahead of every published one on every model, by sparsity."""
    lines = []
    for sparsity in reversed(found.sparsities):
        best = {
            model: max(
                (found.entry(AVERAGE_FEATURES, model, way, sparsity).mean or 0.0, way)
                for way in found.ways
                if way in _PUBLISHED
            )
            for model in found.models
        }
        ahead = [
            way
            for way in found.ways
            if way not in _PUBLISHED
            and all(
                (found.entry(AVERAGE_FEATURES, model, way, sparsity).mean or 0.0) > best[model][0]
                for model in found.models
            )
        ]
        known = ", ".join(f"{title_of(m)} {way} {value:.1f}" for m, (value, way) in best.items())
        said = ", ".join(bold(way) for way in ahead) or "none"
        lines.append(
            f"- At {percent(sparsity)} the best published are {known} (features); ahead of them on "
            f"every model: {said}."
        )
    return lines
