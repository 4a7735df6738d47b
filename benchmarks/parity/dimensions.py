"""Recorded intrinsic dimensions of point clouds, and ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.parity.family import Line
from vlp_plugins.dimension.twonn import Estimator, estimate

DIMENSION_TOLERANCE = 1e-3
"""Relative, of the slope on all points and of every mean over blocks."""


def compare_dimensions(folder: Path) -> Iterator[Line]:
    """Two comparisons per cloud of `<folder>/id`: all points, and the published blocks.

    Args:
        folder: what has the recorded folders; may lack `id`.
    """
    record = folder / "id" / "expected.json"
    if not record.exists():
        return
    clouds = load_file(record.with_name("points.safetensors"))
    for name, expected in json.loads(record.read_text(encoding="utf-8")).items():
        yield from _compare(f"id/{name}", clouds[name], expected)


def _compare(title: str, points: torch.Tensor, expected: dict[str, Any]) -> Iterator[Line]:
    blocks = len(expected["block_dims"])
    found = estimate(points, Estimator(blocks=blocks, duplicates="exact"), what=title)
    slope = _farthest([found.block_dimensions[0]], [expected["slope_all_points"]])
    yield _line(title, "slope on all points", found.block_dimensions[0], slope)
    means = _farthest(
        [*found.block_dimensions, found.dimension],
        [*expected["block_dims"], expected["id_mean_over_blocks"]],
    )
    yield _line(title, f"means over 1 to {blocks} blocks", found.dimension, means)


def _farthest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True))


def _line(title: str, what: str, dimension: float, worst: float) -> Line:
    detail = f"{dimension:.3f}, largest relative difference {worst:.1e}"
    return Line(title, what, detail, worst, worst <= DIMENSION_TOLERANCE)
