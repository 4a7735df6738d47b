"""Files of a sensitivity run: the points measured so far, sensitivity.json and points.csv."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlp_plugins.report.layers import csv_text
from vlp_plugins.runtime.artifacts import write_json
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.files import append_text, write_text
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.tasks.sensitivity.analysis import Analysis
from vlp_plugins.tasks.sensitivity.curves import Curve, Group, Point, Sensitivity

Key = tuple[str, str, float]
"""Level and title of a group, and a sparsity."""


def record_of(point: Point) -> dict[str, Any]:
    """What JSON can keep; a loss that is not finite is null."""
    return {
        "sparsity": point.sparsity,
        "removed": point.removed,
        "losses": [loss if math.isfinite(loss) else None for loss in point.losses],
        "image_to_text": point.image_to_text,
        "text_to_image": point.text_to_image,
    }


def point_of(record: Mapping[str, Any]) -> Point:
    """Inverse of `record_of`; every loss that is not finite is NaN."""
    losses = read_as(tuple[float | None, ...], record["losses"], "losses")
    return Point(
        read_as(float, record["sparsity"], "sparsity"),
        read_as(int, record["removed"], "removed"),
        tuple(math.nan if loss is None else loss for loss in losses),
        read_as(float | None, record["image_to_text"], "image_to_text"),
        read_as(float | None, record["text_to_image"], "text_to_image"),
    )


def key_of(group: Group, sparsity: float) -> Key:
    """What identifies a point."""
    return (group.level, group.title, sparsity)


class PointsFile:
    """JSON lines, one per point, each on the disk before the next is measured.

    The first line says what is measured, so that points of another run are never taken for those
    of this one. A last line that a kill cut short counts as not written. It is no `Checkpoint`:
    points are independent, so each process appends its own at its own pace, and a run of any number
    of processes reads them all.
    """

    def __init__(self, folder: Path | None, run: str, rank: int = 0) -> None:
        """Nothing is read or written yet, and without a folder never.

        `run` is a fingerprint of model, method, data and settings. Each rank writes a file of its
        own.
        """
        self._folder = folder
        self._run = run
        self._first: list[str] = []
        self._path = None if folder is None else folder / f"points-{rank}.jsonl"

    def known(self) -> dict[Key, Point]:
        """The points that all processes wrote before.

        Raises:
            DataError: if they are of another run, or damaged.
        """
        found: dict[Key, Point] = {}
        for path in sorted(self._folder.glob("points-*.jsonl")) if self._folder else ():
            try:
                found |= self._read(path)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path} is damaged ({type(error).__name__}: {first_line(error)}); start again "
                    "without --resume"
                ) from error
        return found

    def _read(self, path: Path) -> dict[Key, Point]:
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines[:-1]]  # the last is empty, or cut short
        records = read_as(list[dict[str, Any]], found, "lines")
        if records and records[0].get("run") != self._run:
            raise DataError(
                f"{path} holds points of another run (other model, data, method or sparsities); "
                "start again without --resume"
            )
        return {
            read_as(Key, [each["level"], each["title"], each["sparsity"]], "a part"): point_of(each)
            for each in records[1:]
        }

    def begin(self, known: Mapping[Key, Point]) -> None:
        """Takes note of the points known before; the first new one is written with them."""
        lines = [json.dumps({"run": self._run})]
        lines += [_line(level, title, point) for (level, title, _), point in known.items()]
        self._first = lines

    def add(self, group: Group, point: Point) -> None:
        """Keeps a point; `OutputError` if the disk does not take it."""
        if self._path is None:
            return
        line = _line(group.level, group.title, point)
        if self._first:
            text = "".join(f"{each}\n" for each in (*self._first, line))
            write_text(self._path, text, own=_is_ours)
            self._first = []
            return
        append_text(self._path, f"{line}\n")


def _is_ours(path: Path) -> bool:
    """True for a file of points of any run."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith('{"run": ')


def _line(level: str, title: str, point: Point) -> str:
    return json.dumps({"level": level, "title": title, **record_of(point)})


KIND = "sensitivity"


def write_analysis(path: str | os.PathLike[str], analysis: Analysis) -> None:
    """Writes everything, whole or not at all; `OutputError` if it cannot be written."""
    write_json(path, KIND, record_of_analysis(analysis), overwrite=True)


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
