"""How each table looks: a function of what was found to Markdown lines and a figure."""

from __future__ import annotations

from benchmarks.papers.views.against_paper import against_paper
from benchmarks.papers.views.calibration_size import calibration_size
from benchmarks.papers.views.classification import classification
from benchmarks.papers.views.compared import compared
from benchmarks.papers.views.dimensions import dimensions
from benchmarks.papers.views.lengths import lengths
from benchmarks.papers.views.modalities import modalities
from benchmarks.papers.views.parts import parts
from benchmarks.papers.views.penalties import penalties
from benchmarks.papers.views.ranked import ranked
from benchmarks.papers.views.view import Rendered, View
from benchmarks.papers.views.whole import whole

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
