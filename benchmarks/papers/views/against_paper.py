"""Tables 4 and 5: figures of several sparsities in one place, beside those of the paper."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import (
    AVERAGE,
    AVERAGE_FEATURES,
    BLEU,
    CIDER,
    IMAGE,
    IMAGE_FEATURES,
    TEXT,
    TEXT_FEATURES,
    Measure,
)
from benchmarks.papers.plots import over_sparsity
from benchmarks.papers.views import published
from benchmarks.papers.views.view import Rendered

_COLUMNS = (TEXT, IMAGE, TEXT_FEATURES, IMAGE_FEATURES, BLEU, CIDER)


def against_paper(found: Found) -> Rendered:
    """A row per method, `63 | 75 | 90` in each figure; the paper's below, and the orders."""
    lines: list[str] = []
    for model in found.models:
        sparsities = " | ".join(f"{100 * sparsity:g}" for sparsity in found.sparsities)
        lines += [f"## {title_of(model)}", "", f"Figures are at {sparsities}% sparsity.", ""]
        lines += [*joined(found, model, _COLUMNS), ""]
        if model in published.BASELINES:
            lines += [*_published(model), ""]
        lines += [*_orders(found, model), ""]
    return Rendered(lines, over_sparsity(found, (AVERAGE, AVERAGE_FEATURES, BLEU, CIDER)))


def joined(found: Found, model: str, columns: Sequence[Measure]) -> list[str]:
    """A row per method; a figure has all sparsities."""
    rows = [[DENSE, *(found.entry(each, model, DENSE, 0.0).text for each in columns)]]
    for way in found.ways:
        figures = [
            " | ".join(
                found.entry(each, model, way, sparsity).text for sparsity in found.sparsities
            )
            for each in columns
        ]
        rows.append([way, *figures])
    return markdown(["Method", *(each.title for each in columns)], rows)


def _published(model: str) -> list[str]:
    rows = [
        [way, *(" | ".join(figures) or "" for figures in columns)]
        for way, columns in published.BASELINES[model].items()
    ]
    lines = [
        "The paper's, for reference (other weights, MSCOCO, other budgets):",
        "",
        *markdown(["Method", *published.COLUMNS], rows),
    ]
    if model == "blip":
        lines += [
            "",
            "R@1 of the dense BLIP is left out: the paper prints 80.7 and 95.1, and the second is "
            "far above every other image R@1. It has no figures at 90%.",
        ]
    return lines


def _orders(found: Found, model: str) -> list[str]:
    """Per sparsity, the methods from best to worst here and in the paper, by average R@1."""
    lines = []
    for place, sparsity in enumerate(found.sparsities):
        texts = [
            f"{where} {order}"
            for measure, where in ((AVERAGE, "re-ranked"), (AVERAGE_FEATURES, "by features"))
            if (order := _order(found, measure, model, sparsity))
        ]
        if theirs := _published_order(model, place):
            texts.append(f"in the paper {theirs}")
        lines.append(f"- Average R@1 at {percent(sparsity)}: {'; '.join(texts) or '-'}.")
    return lines


def _order(found: Found, measure: Measure, model: str, sparsity: float) -> str:
    means = {way: found.entry(measure, model, way, sparsity).mean for way in found.ways}
    return _named({way: mean for way, mean in means.items() if mean is not None})


def _published_order(model: str, place: int) -> str:
    means = {
        way: (float(text[place]) + float(image[place])) / 2
        for way, (text, image, *_) in published.BASELINES.get(model, {}).items()
        if len(text) > place and text[place] != "ERR" and way != DENSE
    }
    return _named(means)


def _named(means: dict[str, float]) -> str:
    order = sorted(means, key=lambda way: -means[way])
    return ", ".join(f"{way} {means[way]:.1f}" for way in order)
