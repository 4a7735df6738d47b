"""How a method is drawn: the same in every plot."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any

from vlp_plugins.report.drawing import COLOURS, colour

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
