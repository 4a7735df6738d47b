"""What is written of a run: sensitivity.json for programs, points.csv for spreadsheets."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Any

from vlp_plugins.report.layers import csv_text
from vlp_plugins.runtime.artifacts import write_json
from vlp_plugins.sensitivity.analysis import Analysis
from vlp_plugins.sensitivity.curves import Curve, Sensitivity
from vlp_plugins.sensitivity.records import record_of

KIND = "sensitivity"


def write_analysis(path: str | os.PathLike[str], analysis: Analysis) -> None:
    """Writes everything, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    write_json(path, KIND, record_of_analysis(analysis))


def record_of_analysis(analysis: Analysis) -> dict[str, Any]:
    """Everything, as JSON can keep it; a loss that is not finite is null."""
    found = analysis.found
    return {
        "adapter": found.adapter,
        "structure": found.structure,
        "settings": dict(found.settings),
        "tolerance": analysis.tolerance,
        "summary": list(analysis.sentences),
        "relations": [
            {"by": r.by, "measure": r.measure, "level": r.level, "scope": r.scope,
             **asdict(r.found)}
            for r in analysis.relations
        ],
        "dimensions": None if analysis.dimensions is None else dict(analysis.dimensions),
        "dense": record_of(found.dense),
        "curves": [
            {
                **asdict(curve.group),
                "prunability": {k: v for k, v in asdict(each).items() if k != "group"},
                "points": [record_of(point) for point in curve.points],
            }
            for curve, each in zip(found.curves, analysis.prunabilities, strict=True)
        ],
    }  # fmt: skip


def to_csv(found: Sensitivity) -> str:
    """One row per point, the dense model first; a loss that is not finite is empty."""
    header = [
        "level", "group", "modality", "depth", "elements", "sparsity", "removed", "loss", "rise",
        "rise_error", "image_to_text", "text_to_image",
    ]  # fmt: skip
    dense = found.dense
    pair = [_cell(dense.image_to_text), _cell(dense.text_to_image)]
    whole = ["dense", "", "", "", "", 0, 0, _cell(dense.loss), 0, 0, *pair]
    return csv_text(
        [header, whole, *(row for curve in found.curves for row in _rows(curve, found))]
    )


def _rows(curve: Curve, found: Sensitivity) -> list[list[Any]]:
    group = curve.group
    depth = "" if group.depth is None else group.depth
    return [
        [
            group.level, group.title, group.modality, depth, group.elements,
            f"{point.sparsity:g}", point.removed, _cell(point.loss), _cell(point.rise(found.dense)),
            _cell(point.rise_error(found.dense)), _cell(point.image_to_text),
            _cell(point.text_to_image),
        ]
        for point in curve.points
    ]  # fmt: skip


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
