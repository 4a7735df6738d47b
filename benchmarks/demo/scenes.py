"""Scenes: coloured handwritten digits in a 3x3 grid on a dark 48x48 background.

The retrieval models see two digits in a scene, the chat model one to four. Everything is
vectorised, so that training can draw fresh scenes for ever: about 8,000 a second on one core. Four
(colour, digit) combinations never occur in a training scene and do occur in test scenes, so that a
test also asks whether a model has understood what a colour is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.demo.captions import Fact
from benchmarks.demo.scans import Scans

CELL_SIZE = 16  # pixels; also the patch size of the models, so that a patch sees one digit
GRID = 3
IMAGE_SIZE = CELL_SIZE * GRID

# The corners of the RGB cube but black, in the order of `captions.COLOURS`, a little softened.
PALETTE = torch.tensor(
    [
        [1.0, 0.1, 0.1],
        [0.1, 1.0, 0.1],
        [0.2, 0.2, 1.0],
        [1.0, 1.0, 0.1],
        [1.0, 0.2, 1.0],
        [0.1, 1.0, 1.0],
        [1.0, 1.0, 1.0],
    ]
)
# (colour, digit) pairs kept out of training; colours and digits all different.
HELD_OUT: tuple[tuple[int, int], ...] = ((0, 7), (1, 2), (2, 5), (4, 9))

PAIRS = (2, 2)
CHAT_OBJECTS = (1, 4)

DIGIT_SIZE = 14.5  # pixels
SCALE_RANGE = 0.08
ROTATION_RANGE = 0.15  # radians
SHIFT_RANGE = 0.8  # pixels
NOISE = 0.02
BACKGROUND_MAX = 0.15


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        images: uint8 `[n, 3, 48, 48]`.
        colours, digits, cells: int64 `[n, k]`; the first `counts[i]` objects of row i are there.
        counts: int64 `[n]`, 1 to k.
    """

    images: Tensor
    colours: Tensor
    digits: Tensor
    cells: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.counts)

    def facts(self) -> list[list[Fact]]:
        """The objects of every scene, for `captions.write` and for checking captions."""
        rows = zip(
            self.colours.tolist(),
            self.digits.tolist(),
            self.cells.tolist(),
            self.counts.tolist(),
            strict=True,
        )
        return [
            [Fact(*triple) for triple in zip(colour[:n], digit[:n], cell[:n], strict=True)]
            for colour, digit, cell, n in rows
        ]


def is_held_out(colours: Tensor, digits: Tensor) -> Tensor:
    """Bool, shape of the arguments: which objects have a combination kept out of training."""
    held_out = torch.zeros(len(PALETTE), 10, dtype=torch.bool)
    for colour, digit in HELD_OUT:
        held_out[colour, digit] = True
    return held_out[colours, digits]


def draw(
    count: int,
    scans: Scans,
    generator: torch.Generator,
    *,
    objects: tuple[int, int] = PAIRS,
    single_fraction: float = 0.0,
    training: bool = True,
) -> Scenes:
    """Draw and render random scenes.

    Args:
        count: number of scenes.
        scans: handwriting to use.
        generator: source of every random choice.
        objects: fewest and most in a scene; every number between is equally likely.
        single_fraction: share of scenes that show one object all the same (a curriculum's easy
            part).
        training: leave out the combinations of `HELD_OUT`.
    """
    fewest, most = objects
    shape = (count, most)
    colours = torch.randint(len(PALETTE), shape, generator=generator)
    digits = torch.randint(10, shape, generator=generator)
    while training and (bad := is_held_out(colours, digits)).any():
        digits[bad] = torch.randint(10, (int(bad.sum()),), generator=generator)
    cells = torch.rand(count, GRID * GRID, generator=generator).argsort(dim=1)[:, :most]
    single = torch.rand(count, generator=generator) < single_fraction
    counts = torch.full((count,), most)
    if fewest < most:
        counts = torch.randint(fewest, most + 1, (count,), generator=generator)
    counts[single] = 1

    chosen = torch.empty(shape, dtype=torch.int64)
    for digit, members in enumerate(scans.by_digit):
        here = digits == digit
        pick = torch.randint(len(members), (int(here.sum()),), generator=generator)
        chosen[here] = members[pick]
    images = _render(scans.images[chosen], PALETTE[colours], cells, counts, generator)
    return Scenes(images, colours, digits, cells, counts)


def _render(
    scans: Tensor, colours: Tensor, cells: Tensor, counts: Tensor, generator: torch.Generator
) -> Tensor:
    """Paint float32 scans `[n, k, 8, 8]` in their colours `[n, k, 3]`; uint8 `[n, 3, 48, 48]`."""
    n, most = scans.shape[:2]
    ink = _distort(scans.flatten(0, 1), generator).view(n, most, CELL_SIZE, CELL_SIZE)
    ink = ink * (torch.arange(most) < counts[:, None])[:, :, None, None]

    tiles = torch.rand(n, 1, 3, 1, 1, generator=generator) * BACKGROUND_MAX
    tiles = tiles.repeat(1, GRID * GRID, 1, CELL_SIZE, CELL_SIZE)
    rows, cover = torch.arange(n)[:, None], ink[:, :, None]
    tiles[rows, cells] = torch.lerp(tiles[rows, cells], colours[..., None, None], cover)
    tiles = tiles.view(n, GRID, GRID, 3, CELL_SIZE, CELL_SIZE)
    images = tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, IMAGE_SIZE, IMAGE_SIZE)
    images.add_(torch.randn(images.shape, generator=generator), alpha=NOISE)
    return images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _distort(scans: Tensor, generator: torch.Generator) -> Tensor:
    """Vary float32 scans `[m, 8, 8]`: angle, size, place, stroke; float32 `[m, 16, 16]`."""
    m = len(scans)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(m, generator=generator) * 2 - 1) * limit

    angle, shrink = uniform(ROTATION_RANGE), CELL_SIZE / DIGIT_SIZE / (1 + uniform(SCALE_RANGE))
    cosine, sine = angle.cos() * shrink, angle.sin() * shrink
    # affine_grid maps output to input coordinates, both -1..1 across the cell and the scan.
    unit = 2 / CELL_SIZE
    shift_x, shift_y = uniform(SHIFT_RANGE) * unit, uniform(SHIFT_RANGE) * unit
    affine = torch.stack(
        [
            torch.stack([cosine, -sine, shift_x], dim=1),
            torch.stack([sine, cosine, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, [m, 1, CELL_SIZE, CELL_SIZE], align_corners=False)
    ink = F.grid_sample(scans[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    stroke = torch.exp(uniform(math.log(1.3)))
    strength = 0.9 + uniform(0.1)
    return ink.clamp_(0, 1).pow(stroke[:, None, None]) * strength[:, None, None]
