"""Table 10: R@1 by the ridge penalty of CHITA and CHITA++, and the trials of the TPE search."""

from __future__ import annotations

from dataclasses import replace
from math import log10
from typing import TYPE_CHECKING, Any

from benchmarks.papers.comparing import standard_error
from benchmarks.papers.experiments import pruner_search
from benchmarks.papers.experiments.searches import TPE
from benchmarks.papers.findings import Entry, Found
from benchmarks.papers.layout import markdown, percent, title_of, with_best
from benchmarks.papers.measures import AVERAGE_FEATURES, IMAGE_FEATURES, TEXT_FEATURES
from benchmarks.papers.plots import Line, draw_lines, panels
from benchmarks.papers.views import published_penalties
from benchmarks.papers.views.view import Rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = (TEXT_FEATURES, IMAGE_FEATURES, AVERAGE_FEATURES)
_TRIAL_COLUMNS = (AVERAGE_FEATURES, TEXT_FEATURES, IMAGE_FEATURES)
_FIRST = " The first penalty of each method is that of the other tables."
_PANELS = ("average R@1, features", "the paper's average R@1")


def penalties(found: Found) -> Rendered:
    """A row per method and penalty beside the paper's; what is chosen; then the search."""
    first = "" if found.origins else _FIRST
    lines = [
        "Retrieval at 63% sparsity, measured on the development split: the penalty is chosen by "
        f"the average R@1.{first}",
        "",
    ]
    for model in found.models:
        lines += [f"## {title_of(model)}", "", *_table(found, model), "", *_choices(found, model)]
    lines += [
        "As good: not more than two standard errors below the best, as of independent queries. The "
        "paper's figures are of other weights, MSCOCO, and the published recipe of CHITA, whose "
        "penalties are on another scale.",
        "",
        *([] if found.origins else search_trials(found)),
    ]
    rows = [title_of(model) for model in found.models]
    return Rendered(lines, panels(rows, _PANELS, lambda *place: _draw(found, *place)))


def by_method(found: Found) -> dict[str, dict[float, str]]:
    """By method the way of every penalty."""
    methods: dict[str, dict[float, str]] = {}
    for name, way in found.ways.items():
        methods.setdefault(way.method, {})[float(way.parameters["lambda"])] = name
    return methods


def power(value: float) -> str:
    """A penalty as a power of ten."""
    return f"1e{round(log10(value))}"


def as_good(entries: dict[float, Entry], queries: int) -> tuple[float, list[float]] | None:
    """The penalty that is best, and the others that may be as good; None without figures."""
    means = {value: entry.mean for value, entry in entries.items() if entry.mean is not None}
    if not means:
        return None
    best = max(means, key=lambda value: means[value])
    error = 2**0.5 * standard_error(means[best], queries)
    near = [
        value for value, mean in means.items() if value != best and means[best] - mean <= 2 * error
    ]
    return best, near


def _table(found: Found, model: str) -> list[str]:
    (sparsity,) = found.sparsities
    rows = []
    for method, ways in by_method(found).items():
        figures = [
            with_best([found.entry(each, model, way, sparsity) for way in ways.values()])
            for each in _COLUMNS
        ]
        for i, value in enumerate(ways):
            paper = published_penalties.row(model, method, value)
            rows.append([method, power(value), *(column[i] for column in figures), *paper])
    header = ["Method", "lambda", *(each.title for each in _COLUMNS)]
    return markdown([*header, "Paper: Text R@1", "Image R@1", "Average R@1"], rows)


def _choices(found: Found, model: str) -> list[str]:
    (sparsity,) = found.sparsities
    lines = []
    for method, ways in by_method(found).items():
        entries = {
            value: found.entry(AVERAGE_FEATURES, model, way, sparsity)
            for value, way in ways.items()
        }
        chosen = as_good(entries, found.queries(model))
        if chosen is None:
            continue
        best, near = chosen
        text = f"- {method}: {power(best)} is best"
        text += f"; as good: {', '.join(map(power, near))}" if near else ""
        lines.append(f"{text}. The paper's best: {power(published_penalties.best(model, method))}.")
    return [*lines, ""] if lines else []


def _draw(found: Found, axis: Axes, i: int, j: int) -> None:
    (sparsity,) = found.sparsities
    model = found.models[i]
    lines = {}
    for method, ways in by_method(found).items():
        if j == 0:
            entries = [found.entry(AVERAGE_FEATURES, model, way, sparsity) for way in ways.values()]
            # A model that has not converged is a point here: the fall is what is to be seen.
            lines[method] = Line(list(ways), [replace(each, failed=False) for each in entries])
        else:
            paper = published_penalties.averages(model, method)
            lines[method] = Line(
                list(paper), [Entry(1, 1, {1: average}) for average in paper.values()]
            )
    draw_lines(axis, lines)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("lambda", fontsize=8)


def search_trials(found: Found) -> list[str]:
    """The trials of the search, best first: a table per seed, as far as the search has come."""
    written: list[str] = []
    for seed in found.seeds:
        trials = TPE.done(found.folder, seed)
        title = f"## {TPE.tuner} search: {title_of('blip')} at {percent(pruner_search.SPARSITY)}"
        written += [title, "", f"{len(trials)} of {TPE.trials} trials (seed {seed}).", ""]
        if not trials:
            continue
        rows = []
        for number, trial in enumerate(trials, 1):
            content = TPE.cell(trial["parameters"], seed).content(found.folder) or {}
            figures = [each.of(content) or 0.0 for each in _TRIAL_COLUMNS]
            rows.append((figures[0], [*_said(trial["parameters"]), *figures, number]))
        rows.sort(key=lambda row: row[0], reverse=True)
        header = ["Method", "Parameters", *(each.title for each in _TRIAL_COLUMNS), "Trial"]
        written += [*markdown(header, [_texts(row) for _, row in rows]), ""]
    return written


def _said(drawn: dict[str, Any]) -> tuple[str, str]:
    """The method and its parameters as one reads them."""
    own = dict(drawn["pruner"])
    name = own.pop(pruner_search.NAME)
    if own.pop("id", False):
        name = f"id*{name}"
    said = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in own.items()
    ]
    return name, ", ".join(said)


def _texts(row: list[Any]) -> list[str]:
    return [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row]
