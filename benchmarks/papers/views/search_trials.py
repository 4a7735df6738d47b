"""The trials of the search over methods and their parameters, the best first."""

from __future__ import annotations

from typing import Any

from benchmarks.papers.experiments import pruner_search
from benchmarks.papers.experiments.searches import TPE
from benchmarks.papers.findings import Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import AVERAGE_FEATURES, IMAGE_FEATURES, TEXT_FEATURES

_COLUMNS = (AVERAGE_FEATURES, TEXT_FEATURES, IMAGE_FEATURES)


def lines(found: Found) -> list[str]:
    """A table per seed, as far as the search has come."""
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
            figures = [each.of(content) or 0.0 for each in _COLUMNS]
            rows.append((figures[0], [*_said(trial["parameters"]), *figures, number]))
        rows.sort(key=lambda row: row[0], reverse=True)
        header = ["Method", "Parameters", *(each.title for each in _COLUMNS), "Trial"]
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
