"""The figures that tables show: where a cell's file has them, and what a column calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Content = Mapping[str, Any]

FAILED_BELOW = 0.5
"""Average R@1 by features, in percent, below which a model counts as not converged: ERR."""


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        title: of the column.
        task: of the cells that have it.
        metrics: names among the cell's `metrics`; the mean of several is shown.
    """

    title: str
    task: str
    metrics: tuple[str, ...]

    def of(self, content: Content) -> float | None:
        """What a cell's file says; None if a metric is absent."""
        found = [content["metrics"].get(name) for name in self.metrics]
        return None if not found or None in found else fmean(found)


_RANKED = ("image_to_text_r1", "text_to_image_r1")
_BY_FEATURES = tuple(f"features_{name}" for name in _RANKED)

TEXT = Measure("Text R@1, re-ranked", "retrieval", _RANKED[:1])
IMAGE = Measure("Image R@1, re-ranked", "retrieval", _RANKED[1:])
TEXT_FEATURES = Measure("Text R@1, features", "retrieval", _BY_FEATURES[:1])
IMAGE_FEATURES = Measure("Image R@1, features", "retrieval", _BY_FEATURES[1:])
AVERAGE = Measure("Average R@1, re-ranked", "retrieval", _RANKED)
AVERAGE_FEATURES = Measure("Average R@1, features", "retrieval", _BY_FEATURES)
BLEU = Measure("BLEU@4", "captioning", ("bleu4",))
CIDER = Measure("CIDEr", "captioning", ("cider",))
METEOR = Measure("METEOR", "captioning", ("meteor",))
SPICE = Measure("SPICE", "captioning", ("spice",))
VQA = Measure("VQA accuracy", "vqa", ("accuracy",))

COLUMNS: dict[str, tuple[Measure, ...]] = {
    "retrieval": (TEXT, IMAGE, TEXT_FEATURES, IMAGE_FEATURES),
    "captioning": (BLEU, CIDER, METEOR, SPICE),
    "vqa": (VQA,),
}
"""Of a table that shows everything, by task."""

DRAWN: dict[str, tuple[Measure, ...]] = {
    "retrieval": (AVERAGE, AVERAGE_FEATURES),
    "captioning": (CIDER,),
    "vqa": (VQA,),
}
"""Of its plot."""


def converged(content: Content) -> float:
    """The average R@1 that tells whether a model of retrieval has converged, in percent."""
    for measure in (AVERAGE_FEATURES, AVERAGE):
        if (value := measure.of(content)) is not None:
            return value
    return 100.0
