"""Curves made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_plugins.tasks.sensitivity.curves import Curve, Group, Point, Sensitivity

SPARSITIES = (0.5, 0.75, 0.9)
DENSE = Point(0.0, 0, (1.0, 2.0, 1.5), 90.0, 80.0)


def group(title: str, level: str = "block", depth: int | None = 0, elements: int = 100) -> Group:
    modality = title.split()[0]
    return Group(title, level, modality, depth, (f"{title} weight",), elements)


def curve(
    title: str, factors: Sequence[float], level: str = "block", *, wobble: float = 0.0
) -> Curve:
    """Losses are the dense ones times a factor, on every other batch `wobble` more of it."""
    points = []
    for sparsity, factor in zip(SPARSITIES, factors, strict=True):
        losses = tuple(
            loss * (factor + wobble * (batch % 2)) for batch, loss in enumerate(DENSE.losses)
        )
        points.append(Point(sparsity, int(sparsity * 100), losses, 90.0 / factor, 80.0 / factor))
    return Curve(group(title, level), tuple(points))


def found(*curves: Curve) -> Sensitivity:
    return Sensitivity(DENSE, curves, "structure", "toy", {"method": "omp"})
