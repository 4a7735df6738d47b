"""Charts and heat maps as values: where everything lies. The template of pages draws them as SVG.

A chart is part of the page: it has the page's fonts and its colours in light and dark, needs no
script, and takes a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.runtime.numbers import percent

WIDTH, HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 20.0, 26.0, 44.0
_COLOURS, _DASHES = 7, ("", "6 3", "2 3", "8 3 2 3")
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "M-3.5 -3.5h7v7h-7z",  # square
    "M0 -4.5L4.5 3.5H-4.5z",  # triangle
    "M0 -5L4 0L0 5L-4 0z",  # diamond
    "M0 4.5L4.5 -3.5H-4.5z",  # triangle on its tip
    "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",  # plus
    "M-4.5 -1.5h9v3h-9z",  # bar
    "M0 -5L1.4 -1.4L5 0L1.4 1.4L0 5L-1.4 1.4L-5 0L-1.4 -1.4z",  # star
)
"""Of as many shapes as no multiple of the colours, so that a colour comes with another shape."""


@dataclass(frozen=True)
class Axis:
    """How values are shown along one axis.

    Attributes:
        label: what they are, with the unit.
        percent: values are fractions, shown in percent.
        log: logarithmic; all values are positive.
        low: where it begins, or lower if a value does; None: at the values.
        high: where it ends, or higher if a value does; None: at the values.
        whole: only whole numbers have a tick.
    """

    label: str = ""
    percent: bool = False
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False

    def text(self, value: float) -> str:
        """A value as a reader writes it."""
        return percent(value, 0) if self.percent else f"{value:,.6g}"


SPARSITY = Axis("sparsity", percent=True)


@dataclass(frozen=True)
class Mark:
    """One point as it is drawn; `low` and `high` are the ends of its error bar."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """One series as it is drawn: colour, shape and dashes tell it from others."""

    name: str
    colour: int
    shape: str
    dashes: str
    path: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Chart:
    """A chart with a title and a sentence that says how to read it; made by `line_chart`.

    Positions are in a field of `WIDTH` x `HEIGHT`, from the upper left corner.
    """

    title: str
    note: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    reference: tuple[float, str] | None
    dots: Sequence[tuple[float, float, int]]
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


Point = tuple[float, float] | tuple[float, float, float | None]
"""x, y, and the standard error of y if there is one."""


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x: Axis = SPARSITY,
    y: Axis = Axis(),
    reference: tuple[float, str] | None = None,
    dots: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    joined: bool = True,
    note: str = "",
) -> Chart:
    """A chart with one line per series; readers tell them apart without colour, too.

    Points are in any order; those that are not finite are left out. `reference` is a value of y and
    its name, such as that of the dense model, drawn as a line across; `dots` are faint further
    points by name of a series.
    """
    kept = {name: sorted(filter(_finite, points)) for name, points in series.items()}
    faint = dots or {}
    many = [point for points in kept.values() for point in points]
    xs = [p[0] for p in many] + [p[0] for points in faint.values() for p in points]
    ys = [p[1] for points in faint.values() for p in points]
    ys += [value for p in many for value in (p[1] - _error(p), p[1], p[1] + _error(p))]
    if reference is not None:
        ys.append(reference[0])
    if y.log:
        ys = [value for value in ys if value > 0]
    across, place_x = _scale(x, xs, Chart.left, Chart.right, margin=0.03)
    up, place_y = _scale(y, ys, Chart.bottom, Chart.top, margin=0.06)

    def mark(name: str, point: Point) -> Mark:
        error = _error(point)
        lowest = point[1] - error
        text = f"{name}: {point[1]:,.4g}{f' ± {error:.2g}' if error else ''} at {x.text(point[0])}"
        return Mark(
            round(place_x(point[0]), 1),
            round(place_y(point[1]), 1),
            # An error bar below zero has no place on a logarithmic axis: it ends at the bottom.
            None if not error else Chart.bottom if y.log and lowest <= 0
            else round(place_y(lowest), 1),
            round(place_y(point[1] + error), 1) if error else None,
            text,
        )  # fmt: skip

    lines = []
    for number, (name, points) in enumerate(kept.items()):
        marks = [mark(name, point) for point in points]
        lines.append(
            Line(
                name,
                number % _COLOURS,
                _MARKERS[number % len(_MARKERS)],
                _DASHES[number // _COLOURS % len(_DASHES)],
                "M" + "L".join(f"{m.x} {m.y}" for m in marks) if joined and marks else "",
                marks,
            )
        )
    colours = {line.name: line.colour for line in lines}
    return Chart(
        title,
        note,
        x,
        y,
        lines,
        across,
        up,
        None if reference is None else (round(place_y(reference[0]), 1), reference[1]),
        [
            (round(place_x(px), 1), round(place_y(py), 1), colours[name])
            for name, points in faint.items()
            for px, py in points
        ],
    )


_MOST = 1e150
"""Of a number that is drawn: the distance of two is finite, too."""


def _finite(point: Point) -> bool:
    return abs(point[0]) < _MOST and abs(point[1]) < _MOST


def _error(point: Point) -> float:
    """Zero if there is none, or if it is unknown, as that of a single sample is."""
    error = point[2] if len(point) == 3 else None
    return error if error is not None and abs(error) < _MOST else 0.0


def _scale(
    axis: Axis, values: Sequence[float], start: float, end: float, margin: float
) -> tuple[list[tuple[float, str]], Callable[[float], float]]:
    """Ticks with their positions, and the position of a value."""
    lowest = min([*values, *([] if axis.low is None else [axis.low])], default=0.1)
    highest = max([*values, *([] if axis.high is None else [axis.high])], default=1.0)
    move = math.log10 if axis.log else float
    low, high = move(lowest), move(highest)
    room = (high - low) * margin or 0.5
    low, high = low - room, high + room

    def place(value: float) -> float:
        return start + (move(value) - low) / (high - low) * (end - start)

    return [(round(place(t), 1), axis.text(t)) for t in _ticks(axis, low, high)], place


def _ticks(axis: Axis, low: float, high: float) -> list[float]:
    """About five round values between the ends, which are logarithms on a logarithmic axis."""
    if axis.log:
        powers = [10.0**power for power in range(math.floor(low), math.ceil(high) + 1)]
        for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            found = [p * f for p in powers for f in factors if low <= math.log10(p * f) <= high]
            if len(found) >= 3:
                return found
        low, high = 10**low, 10**high
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) < 6)
    if axis.whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step), math.floor(high / step)
    # Rounded, as 3 * 0.1 is not 0.3.
    return [round(number * step, 12) for number in range(first, last + 1)]


@dataclass(frozen=True)
class HeatMap:
    """A table of fractions, 0 to 1, each on a ground whose colour is the stronger the higher it is.

    `corner` says what the rows are: name and fractions, None where there is nothing.
    """

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
