"""Ways to prune by their retrieval over all models and sparsities: what a search ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.papers.candidates import AS_PUBLISHED, CALLED
from benchmarks.papers.comparing import Margin, margin
from benchmarks.papers.findings import Entry, Found
from benchmarks.papers.layout import markdown, percent, title_of, with_best
from benchmarks.papers.measures import AVERAGE, AVERAGE_FEATURES, Measure
from benchmarks.papers.plots import COLOURS, HEIGHT, panels
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ranked(found: Found) -> Rendered:
    """A row per way, by its mean over all columns; those with fewer columns below."""
    columns = [
        (model, sparsity) for sparsity in reversed(found.sparsities) for model in found.models
    ]
    lines = [
        "Average R@1 by the features alone, which ways are chosen by; below it that after "
        "re-ranking. Published methods are in italics, whatever their settings.",
        "",
    ]
    for measure in (AVERAGE_FEATURES, AVERAGE):
        lines += [f"{measure.title}:", "", *_table(found, measure, columns), ""]
    for measure in (AVERAGE_FEATURES, AVERAGE):
        lines += [*_verdict(found, measure), ""]
    if renamed := [way for way in found.ways if way in CALLED]:
        same = ", ".join(f"`{way}` is `{CALLED[way]}`" for way in renamed)
        lines += [f"In the other tables {same}.", ""]
    return Rendered(lines, _drawn(found))


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
        name = f"*{way}*" if way in AS_PUBLISHED else way
        rows.append([name, *(text[i] for text in texts), "" if mean is None else f"{mean:.1f}"])
    header = [f"{title_of(model)} {percent(sparsity)}" for model, sparsity in columns]
    return markdown(["Method", *header, "Mean"], rows)


def _asked(entries: Sequence[Entry]) -> int:
    return sum(entry.asked > 0 for entry in entries)


def _mean(entries: Sequence[Entry]) -> float | None:
    """Over the columns that a way has, if all of it is there; what has not converged is 0."""
    if any(entry.there < entry.asked for entry in entries):
        return None
    return fmean(entry.mean or 0.0 for entry in entries if entry.asked)


def _verdict(found: Found, measure: Measure) -> list[str]:
    """By sparsity the best published way of each model, and what is ahead of it on all models."""
    lines = [f"{measure.title}, against the best published way of this page on each model:", ""]
    for sparsity in reversed(found.sparsities):
        best = {
            model: first
            for model in found.models
            if (first := _best(found, measure, model, sparsity)) is not None
        }
        if len(best) < len(found.models):
            continue  # nothing to compare with
        known = ", ".join(f"{title_of(m)} {w} {e.text}" for m, (w, e) in best.items())
        said = [
            f"**{way}** by {' and '.join(each.text for each in margins)}"
            for way in found.ways
            if way not in AS_PUBLISHED
            and (margins := _margins(found, measure, way, sparsity, best))
            and all(each.points > 0 for each in margins)
        ]
        lines.append(f"- {percent(sparsity)}: {known}. Ahead of each: {'; '.join(said) or 'none'}.")
    return lines


def _best(found: Found, measure: Measure, model: str, sparsity: float) -> tuple[str, Entry] | None:
    ways = {
        way: found.entry(measure, model, way, sparsity) for way in found.ways if way in AS_PUBLISHED
    }
    whole = {way: each for way, each in ways.items() if each.asked and each.there == each.asked}
    return max(whole.items(), key=lambda item: item[1].mean or 0.0, default=None)


def _margins(
    found: Found,
    measure: Measure,
    way: str,
    sparsity: float,
    best: Mapping[str, tuple[str, Entry]],
) -> list[Margin]:
    """Over the best of every model; empty if one is missing."""
    made = [
        margin(
            best[model][1],
            found.entry(measure, model, way, sparsity),
            found.queries(model),
        )
        for model in found.models
    ]
    return [each for each in made if each is not None] if all(made) else []


def _drawn(found: Found) -> Figure:
    """A panel per model and sparsity, a bar per way, published ones grey."""
    sparsities = found.sparsities[::-1]

    def draw(axis: Axes, i: int, j: int) -> None:
        model, sparsity = found.models[i], sparsities[j]
        entries = {way: found.entry(AVERAGE_FEATURES, model, way, sparsity) for way in found.ways}
        there = {way: each for way, each in entries.items() if each.there}
        ways = sorted(there, key=lambda way: there[way].mean or 0.0)
        axis.barh(
            ways,
            [there[way].mean or 0.0 for way in ways],
            xerr=[there[way].spread or 0.0 for way in ways],
            color=["0.7" if way in AS_PUBLISHED else COLOURS[0] for way in ways],
            error_kw={"elinewidth": 0.8},
        )

    return panels(
        [title_of(model) for model in found.models],
        [f"{percent(sparsity)}, {AVERAGE_FEATURES.title}" for sparsity in sparsities],
        draw,
        max(HEIGHT, 0.18 * len(found.ways)),
        width=4.2,
    )
