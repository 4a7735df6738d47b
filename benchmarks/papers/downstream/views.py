"""Unlabelled images with what they were made from, for pre-training.

Nobody is told which digit an image shows. What is known of it is what a camera would have lost:
the scan as it was, upright and in the middle, and the colour of the ink.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.demo.scans import Scans
from benchmarks.papers.downstream.classes import SIDE, any_colour, ground
from benchmarks.papers.downstream.painting import finish, uniform, write_ink

SHIFT = 5.0  # pixels that a digit is away from the middle
SIZES = (14.0, 28.0)  # pixels
TURN = 0.3  # radians


class Unlabelled(NamedTuple):
    """A batch of pre-training.

    Attributes:
        images: uint8 `[n, 3, 32, 32]`.
        scans: float32 `[n, 8, 8]`, 0 (paper) to 1 (ink).
        colours: float32 `[n, 3]`, 0 to 1.
    """

    images: Tensor
    scans: Tensor
    colours: Tensor


def unlabelled(count: int, scans: Scans, generator: torch.Generator) -> Unlabelled:
    """Images of random scans, in any colour on any ground, of any size and place."""
    chosen = scans.images[torch.randint(len(scans), (count,), generator=generator)]
    colours = any_colour(count, generator)
    centres = SIDE / 2 + uniform((count, 2), -SHIFT, SHIFT, generator)
    sizes = uniform((count,), *SIZES, generator)
    ink = write_ink(chosen, centres, sizes, SIDE, generator, turn=TURN)
    images = torch.lerp(ground(count, generator), colours[:, :, None, None], ink[:, None])
    return Unlabelled(finish(images, generator), chosen, colours)
