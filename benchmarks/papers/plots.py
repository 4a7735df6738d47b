"""Plots of tables: a panel per model and figure, a line or bar per method."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.papers.findings import DENSE, Entry, Found
from benchmarks.papers.layout import title_of
from benchmarks.papers.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours: colour-blind readers can distinguish them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def colour(index: int) -> str:
    """The colour of a line by its place; colours repeat after seven."""
    return COLOURS[index % len(COLOURS)]


def empty_figure(width: float, height: float) -> Figure:
    """A figure of that many inches; no display is needed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def svg_of(figure: Figure) -> str:
    """The figure as an `<svg>` element that refers to nothing outside itself."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "vlp-plugins"}):  # same data, same file
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # links to its format


WIDTH, HEIGHT = 3.1, 2.8  # inches of a panel
_LEGEND = 1.5  # inches

_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _BLACK = COLOURS
_MARKERS = {"-": "o", "--": "s", ":": "^"}


@dataclass(frozen=True)
class Style:
    """Of a line or a bar."""

    colour: str
    line: str = "-"

    def of_line(self) -> dict[str, Any]:
        """As matplotlib takes it."""
        return {
            "color": self.colour,
            "linestyle": self.line,
            "marker": _MARKERS[self.line],
            "markersize": 3.5,
            "linewidth": 1.4,
        }


_STYLES = {
    "random": Style(_BLACK),
    "snip": Style(_PINK),
    "itersnip": Style(_PINK, "--"),
    "omp": Style(_ORANGE),
    "l2": Style(_ORANGE, "--"),
    "lamp": Style(_GREEN),
    "taylor": Style(_GREEN, "--"),
    "chita": Style(_RED),
    "chita++": Style(_RED, "--"),
    "multiflow": Style(_BLUE),
    "wanda": Style(_BLUE, "--"),
    "tamt": Style(_SKY),
    "platon": Style(_SKY, "--"),
    "lamp-tamt": Style(_BLACK, "--"),
    "multiflow-edges": Style(_ORANGE, ":"),
    "multiflow-nodes": Style(_GREEN, ":"),
    "multiflow-inverted": Style(_RED, ":"),
}
_VARIANT = re.compile(r"^id-(factor|budgets)-|-\d+-pairs$")


def style_of(way: str) -> Style:
    """Of a way to prune; with dimensions, or with other data, a method keeps its colour."""
    known = _STYLES.get(_VARIANT.sub("", way))
    return known or Style(colour(zlib.crc32(way.encode())), ":")


@dataclass(frozen=True)
class Line:
    """A line of a panel: y over x, with the spread over seeds where there are several."""

    x: Sequence[float]
    y: Sequence[Entry]


def panels(
    rows: Sequence[str],
    columns: Sequence[str],
    draw: Callable[[Axes, int, int], None],
    height: float = HEIGHT,
    width: float = WIDTH,
) -> Figure:
    """A grid of panels with one legend at the right; a model not yet measured has an empty one.

    Args:
        rows: titles; they stand at the left.
        columns: titles; they stand at the top.
        draw: fills the panel of a row and a column; labels become the legend.
        height: of a panel, in inches.
        width: of a panel, in inches.
    """
    figure = empty_figure(width * len(columns) + _LEGEND, height * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    labels: dict[str, Any] = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axis = grid[i][j]
            draw(axis, i, j)
            axis.set_title(f"{row}: {column}" if row else column, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            labels.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8)
    return figure


def draw_lines(axis: Axes, lines: Mapping[str, Line]) -> None:
    """A line per way to prune, without the points that are missing or have failed."""
    for way, line in lines.items():
        points = [
            (x, mean, y.spread or 0.0)
            for x, y in zip(line.x, line.y, strict=True)
            if (mean := y.mean) is not None
        ]
        if not points:
            continue
        xs, ys, spreads = zip(*points, strict=True)
        axis.errorbar(
            xs,
            ys,
            yerr=spreads,
            elinewidth=0.8,
            label=way,
            **style_of(way).of_line(),
        )


def draw_dense(axis: Axes, entry: Entry) -> None:
    """The model that is not pruned, as a level."""
    if entry.mean is not None:
        axis.axhline(entry.mean, color="0.5", linestyle=(0, (1, 1)), linewidth=1.2, label=DENSE)


def over_sparsity(found: Found, measures: Sequence[Measure]) -> Figure:
    """A panel per model and figure: sparsity on x, a line per way to prune; bars if it is one."""
    if len(found.sparsities) == 1:
        return _at_one_sparsity(found, measures)

    def draw(axis: Axes, i: int, j: int) -> None:
        model, measure = found.models[i], measures[j]
        lines = {
            way: Line(
                [100 * sparsity for sparsity in found.sparsities],
                [found.entry(measure, model, way, sparsity) for sparsity in found.sparsities],
            )
            for way in found.ways
        }
        draw_dense(axis, found.entry(measure, model, DENSE, 0.0))
        draw_lines(axis, lines)
        axis.set_xticks([100 * sparsity for sparsity in found.sparsities])
        axis.set_xlabel("sparsity, %", fontsize=8)
        axis.set_ylim(bottom=0)

    return panels(
        [title_of(model) for model in found.models], [each.title for each in measures], draw
    )


def _at_one_sparsity(found: Found, measures: Sequence[Measure]) -> Figure:
    (sparsity,) = found.sparsities
    ways = list(found.ways)[::-1]  # the first on top

    def draw(axis: Axes, i: int, j: int) -> None:
        model, measure = found.models[i], measures[j]
        means = [found.entry(measure, model, way, sparsity).mean or 0.0 for way in ways]
        axis.barh(ways, means, color=[style_of(way).colour for way in ways])
        if (dense := found.entry(measure, model, DENSE, 0.0).mean) is not None:
            axis.axvline(dense, color="0.5", linestyle=(0, (1, 1)), label=DENSE)
        axis.set_xlabel(f"at {sparsity:.0%} sparsity", fontsize=8)

    titles = [title_of(model) for model in found.models]
    return panels(titles, [each.title for each in measures], draw, max(HEIGHT, 0.18 * len(ways)))


def draw_bars(
    axis: Axes,
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float | None]],
    colours: Sequence[str],
) -> None:
    """Groups of bars side by side; a value that is missing leaves its place empty.

    Args:
        axis: to draw on.
        groups: names on x.
        bars: by label, a height per group.
        colours: a colour per label.
    """
    width = 0.8 / len(bars)
    for place, (label, heights) in enumerate(bars.items()):
        at = [i + (place + 0.5) * width - 0.4 for i in range(len(groups))]
        shown = [0.0 if height is None else height for height in heights]
        axis.bar(at, shown, width, label=label, color=colours[place])
    axis.set_xticks(range(len(groups)), groups, rotation=90 if len(groups) > 5 else 0)
