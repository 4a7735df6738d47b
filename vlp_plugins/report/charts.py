"""Charts as SVG text, to stand inside the page: nothing is loaded from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlp_plugins.report.layers import LayerRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def sparsity_by_depth(rows: Sequence[LayerRow], titles: Sequence[str]) -> str:
    """One panel per mask set: depth on x, sparsity on y, one line per modality.

    A point is the sparsity of all weights of one modality at one depth together.
    """
    figure = _figure(4.2 * len(titles), 2.8)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    modalities = list(dict.fromkeys(row.modality for row in rows))
    for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for modality, colour in zip(modalities, COLOURS * len(modalities), strict=False):
            depths, values = _mean_by_depth([r for r in rows if r.modality == modality], i)
            axis.plot(depths, values, marker="o", markersize=3, color=colour, label=modality)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("depth")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("sparsity")
    axes[0].legend(fontsize=8)
    return _svg(figure)


def _mean_by_depth(rows: Sequence[LayerRow], mask: int) -> tuple[list[int], list[float]]:
    kept: dict[int, int] = {}
    total: dict[int, int] = {}
    for row in rows:
        kept[row.depth] = kept.get(row.depth, 0) + row.kept[mask]
        total[row.depth] = total.get(row.depth, 0) + row.elements
    depths = sorted(total)
    return depths, [1 - kept[depth] / total[depth] for depth in depths]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "vlp-plugins"}):  # same data, same file
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # links to its format
