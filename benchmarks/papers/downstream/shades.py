"""Shades of the colour names: near to what pre-training called so, and never the same."""

from __future__ import annotations

import torch
from torch import Tensor

# From, to; in the order of `benchmarks.demo.captions.COLOURS`. Pre-training has one bright shade.
SHADES = torch.tensor(
    [
        [[0.70, 0.05, 0.08], [0.92, 0.28, 0.18]],  # crimson to brick
        [[0.08, 0.50, 0.15], [0.45, 0.80, 0.25]],  # fir to leaf
        [[0.12, 0.15, 0.70], [0.25, 0.42, 0.95]],  # ultramarine to cornflower
        [[0.82, 0.66, 0.05], [0.98, 0.88, 0.40]],  # mustard to straw
        [[0.75, 0.15, 0.58], [0.98, 0.45, 0.78]],  # magenta to rose
        [[0.08, 0.58, 0.62], [0.35, 0.86, 0.84]],  # petrol to aqua
        [[0.74, 0.74, 0.72], [0.94, 0.92, 0.88]],  # ash to ivory
    ]
)


def mix(colours: Tensor, generator: torch.Generator) -> Tensor:
    """A random shade of every colour: int64 `[...]` to float32 RGB `[..., 3]`, 0 to 1."""
    share = torch.rand((*colours.shape, 1), generator=generator)
    ends = SHADES[colours]
    return torch.lerp(ends[..., 0, :], ends[..., 1, :], share)
