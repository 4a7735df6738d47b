"""Figures as SVG text, the same for the same data, in colours for colour-blind readers too."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

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


def depth_axis(axis: Axes) -> None:
    """Makes the x axis one of whole depths."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("depth")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def svg_of(figure: Figure) -> str:
    """The figure as an `<svg>` element that refers to nothing outside itself."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "vlp-plugins"}):  # same data, same file
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # links to its format
