"""Table 8: parts of MULTIFLOW's score, what it would remove last, and random pruning."""

from __future__ import annotations

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, percent, title_of, with_best
from benchmarks.papers.measures import (
    AVERAGE,
    AVERAGE_FEATURES,
    IMAGE,
    IMAGE_FEATURES,
    TEXT,
    TEXT_FEATURES,
)
from benchmarks.papers.plots import over_sparsity
from benchmarks.papers.views import published
from benchmarks.papers.views.view import Rendered

_NAMES = {
    "multiflow-edges": "edges only",
    "multiflow-nodes": "nodes only",
    "multiflow": "both",
    "multiflow-inverted": "inverted",
}
_ORDER = (DENSE, *_NAMES, "random")
_COLUMNS = (TEXT, IMAGE, TEXT_FEATURES, IMAGE_FEATURES)
_PAPER = "xvlm"


def parts(found: Found) -> Rendered:
    """A row per sparsity and part; for X-VLM, the paper's figures beside."""
    lines: list[str] = []
    for model in found.models:
        rows = []
        for sparsity in (0.0, *found.sparsities):
            ways = sorted(found.at(model, sparsity), key=_ORDER.index)
            figures = [
                with_best([found.entry(each, model, way, sparsity) for way in ways])
                for each in _COLUMNS
            ]
            for i, way in enumerate(ways):
                row = [percent(sparsity), _NAMES.get(way, way), *(each[i] for each in figures)]
                if model == _PAPER:
                    row += published.PARTS.get((way, sparsity), ("", ""))
                rows.append(row)
        header = ["Sparsity", "Method", *(each.title for each in _COLUMNS)]
        if model == _PAPER:
            header += ["Paper: Text R@1", "Paper: Image R@1"]
        lines += [f"## {title_of(model)}", "", *markdown(header, rows), ""]
    lines += [
        "Edges only: the magnitude within layers. Nodes only: the saliency of both ends. Inverted: "
        "what MULTIFLOW would remove first is kept. The paper's figures are of other weights and "
        "MSCOCO.",
        "",
    ]
    return Rendered(lines, over_sparsity(found, (AVERAGE, AVERAGE_FEATURES)))
