"""Frames around a digit: outlines of simple shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.papers.downstream.painting import uniform

FRAMES = ("round", "square", "pointed", "barred")


def draw_frames(kinds: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Outlines near the middle of squares, in varied sizes and places.

    Args:
        kinds: int64 `[m]`, numbers of `FRAMES`: a circle, a square, a diamond, two upright bars.
        side: of the square, in pixels.
        generator: source of every random choice.

    Returns:
        float32 `[m, side, side]`, 0 to 1.
    """
    count = len(kinds)
    centres = side / 2 + uniform((count, 2), -1.5, 1.5, generator)
    radius = uniform((count, 1, 1), 0.36 * side, 0.44 * side, generator)
    width = uniform((count, 1, 1), 0.8, 1.5, generator)
    pixels = torch.arange(side) + 0.5
    x = (pixels[None, None, :] - centres[:, 0, None, None]).abs().expand(-1, side, -1)
    y = (pixels[None, :, None] - centres[:, 1, None, None]).abs().expand(-1, -1, side)
    distances = torch.stack(
        [
            (x.square() + y.square()).sqrt() - radius,
            torch.maximum(x, y) - radius,
            (x + y - 1.35 * radius) / 2**0.5,
            torch.where(y < radius, x - 0.9 * radius, torch.inf),
        ]
    )
    chosen = distances[kinds, torch.arange(count)]
    return (width + 0.5 - chosen.abs()).clamp(0, 1)
