"""How each table looks: a function of what was found to Markdown lines and a figure."""

from __future__ import annotations

from benchmarks.tables.views.against_paper import against_paper
from benchmarks.tables.views.calibration_size import calibration_size
from benchmarks.tables.views.classification import classification
from benchmarks.tables.views.compared import compared
from benchmarks.tables.views.dimensions import dimensions
from benchmarks.tables.views.lengths import lengths
from benchmarks.tables.views.modalities import modalities
from benchmarks.tables.views.parts import parts
from benchmarks.tables.views.penalties import penalties
from benchmarks.tables.views.ranked import ranked
from benchmarks.tables.views.view import Rendered, View
from benchmarks.tables.views.whole import whole

__all__ = [
    "Rendered",
    "View",
    "against_paper",
    "calibration_size",
    "classification",
    "compared",
    "dimensions",
    "lengths",
    "modalities",
    "parts",
    "penalties",
    "ranked",
    "whole",
]
