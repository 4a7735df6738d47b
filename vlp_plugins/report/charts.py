"""Charts as SVG text, to stand inside the page: nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_plugins.report.drawing import colour, depth_axis, empty_figure, svg_of
from vlp_plugins.report.layers import LayerRow


def sparsity_by_depth(rows: Sequence[LayerRow], titles: Sequence[str]) -> str:
    """One panel per mask set: depth on x, sparsity on y, one line per modality.

    A point is the sparsity of all weights of one modality at one depth together.
    """
    figure = empty_figure(4.2 * len(titles), 2.8)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    modalities = list(dict.fromkeys(row.modality for row in rows))
    for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for place, modality in enumerate(modalities):
            depths, values = _mean_by_depth([r for r in rows if r.modality == modality], i)
            style = {"marker": "o", "markersize": 3, "color": colour(place)}
            axis.plot(depths, values, label=modality, **style)
        axis.set_title(title, fontsize=9)
        depth_axis(axis)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("sparsity")
    axes[0].legend(fontsize=8)
    return svg_of(figure)


def _mean_by_depth(rows: Sequence[LayerRow], mask: int) -> tuple[list[int], list[float]]:
    kept: dict[int, int] = {}
    total: dict[int, int] = {}
    for row in rows:
        kept[row.depth] = kept.get(row.depth, 0) + row.kept[mask]
        total[row.depth] = total.get(row.depth, 0) + row.elements
    depths = sorted(total)
    return depths, [1 - kept[depth] / total[depth] for depth in depths]
