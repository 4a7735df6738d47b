"""The main table: everything that was measured, then the paper's captions beside ours."""

from __future__ import annotations

from benchmarks.papers.findings import Found
from benchmarks.papers.layout import markdown, percent, title_of
from benchmarks.papers.measures import METEOR
from benchmarks.papers.views.published import CAPTIONS
from benchmarks.papers.views.view import Rendered
from benchmarks.papers.views.whole import whole

_PAPERS = ("blip", "xvlm")


def compared(found: Found) -> Rendered:
    """As `whole`, with Table 9 of MULTIFLOW: its Table 2 is not in the supplementary material."""
    rendered = whole(found)
    if METEOR.task not in found.tasks:
        return rendered
    models = [model for model in _PAPERS if model in found.models]
    header = ["Sparsity", "Method"]
    for model in models:
        header += [f"{title_of(model)} METEOR", "the paper's", "its SPICE"]
    rows = [
        [
            percent(sparsity),
            way,
            *(text for model in models for text in _row(found, model, way, sparsity)),
        ]
        for way, sparsity in CAPTIONS
    ]
    lines = ["## Captions beside the paper's (Table 9, MSCOCO)", "", *markdown(header, rows), ""]
    return Rendered([*rendered.lines, *lines], rendered.figure)


def _row(found: Found, model: str, way: str, sparsity: float) -> tuple[str, str, str]:
    meteor, spice = CAPTIONS[way, sparsity][2 * _PAPERS.index(model) :][:2]
    return found.entry(METEOR, model, way, sparsity).text, meteor, spice
