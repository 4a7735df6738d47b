"""Handwriting painted anywhere on a textured ground; everything is vectorised."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.02
STROKE = 1.3  # the ink's exponent varies by this factor either way


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Float32 drawn evenly between two bounds."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def place(scans: Tensor, centres: Tensor, sizes: Tensor, angles: Tensor, side: int) -> Tensor:
    """Scans put onto an empty square, turned about their centres.

    Args:
        scans: float32 `[m, h, w]`, 0 to 1.
        centres: float32 `[m, 2]`, x and y in pixels from the top left corner.
        sizes: float32 `[m]`, side of the scan in pixels.
        angles: float32 `[m]`, radians.
        side: of the square, in pixels.

    Returns:
        float32 `[m, side, side]`.
    """
    # affine_grid maps output to input coordinates, both -1..1 across the square and the scan.
    scale = side / sizes
    cosine, sine = angles.cos() * scale, angles.sin() * scale
    linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    offset = -linear @ (2 * centres / side - 1)[..., None]
    affine = torch.cat([linear, offset], dim=2)
    grid = F.affine_grid(affine, [len(scans), 1, side, side], align_corners=False)
    ink = F.grid_sample(scans[:, None], grid, mode="bilinear", align_corners=False)
    return ink[:, 0].clamp_(0, 1)


def write_ink(
    scans: Tensor,
    centres: Tensor,
    sizes: Tensor,
    side: int,
    generator: torch.Generator,
    *,
    turn: float,
) -> Tensor:
    """`place` with angles up to `turn` radians and strokes of varied thickness and strength."""
    count = (len(scans),)
    ink = place(scans, centres, sizes, uniform(count, -turn, turn, generator), side)
    exponent = uniform(count, -math.log(STROKE), math.log(STROKE), generator).exp()
    strength = uniform(count, 0.85, 1.0, generator)
    return ink.pow(exponent[:, None, None]) * strength[:, None, None]


def texture(
    count: int, side: int, generator: torch.Generator, *, light: tuple[float, float], rough: float
) -> Tensor:
    """Tinted grounds that vary slowly from place to place: float32 `[count, 3, side, side]`.

    Args:
        count: how many.
        side: in pixels.
        generator: source of every random choice.
        light: bounds of the mean brightness, 0 to 1.
        rough: how far places and channels differ from it.
    """
    base = uniform((count, 1, 1, 1), *light, generator)
    tint = uniform((count, 3, 1, 1), -rough, rough, generator)
    coarse = uniform((count, 3, 5, 5), -rough, rough, generator)
    return base + tint + F.interpolate(coarse, size=side, mode="bilinear", align_corners=True)


def finish(images: Tensor, generator: torch.Generator) -> Tensor:
    """Adds the noise of a camera: float32 0..1 to uint8, same shape."""
    noisy = images + NOISE * torch.randn(images.shape, generator=generator)
    return noisy.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
