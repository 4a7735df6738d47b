"""Three sets of images to classify, 32x32 pixels, in the roles of CIFAR-10, CIFAR-100, Flowers-102.

- `digits`: 10 classes, the digit; ink of any colour on any ground.
- `coloured`: 70 classes, digit and colour name.
- `framed`: 40 classes, digit and the frame around it, ten images of each to learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.papers.downstream.painting import finish, texture, uniform, write_ink
from benchmarks.papers.downstream.shades import mix
from benchmarks.papers.downstream.splits import Split, pick, scans_of, seed_of

SIDE = 32
SIZES: dict[Split, int] = {"train": 6000, "dev": 500, "test": 1000}
SHOTS = 10  # images of a class of `framed`, in train and in dev
_CHUNK = 1000
FRAMES = ("round", "square", "pointed", "barred")  # outlines of simple shapes around a digit


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split of one set.

    Attributes:
        images: uint8 `[n, 3, 32, 32]`.
        labels: int64 `[n]`.
        classes: names, by label.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


Paint = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Scans `[n, 8, 8]` and labels `[n]` to images, float32 `[n, 3, 32, 32]`."""


@dataclass(frozen=True)
class LabelledSet:
    """What a set shows.

    Attributes:
        classes: names, by label.
        digits: the digit of every label.
        paint: makes the images.
        shots: images per class in train and dev; None for `SIZES`.
        seed: of the set.
    """

    classes: tuple[str, ...]
    digits: tuple[int, ...]
    paint: Paint
    shots: int | None
    seed: int

    def draw(self, split: Split, count: int | None = None, seed: int = 0) -> LabelledImages:
        """Draws a split; classes are equally frequent, up to the remainder.

        Args:
            split: whose handwriting to use.
            count: how many; None for the usual number.
            seed: another one draws other images of the same kind (fresh ones for every run).

        Raises:
            ValueError: if `count` is not positive.
        """
        if count is None:
            few = self.shots is not None and split != "test"
            count = (self.shots or 0) * len(self.classes) if few else SIZES[split]
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        generator = torch.Generator().manual_seed(seed_of(split, 1000 * self.seed + seed))
        order = torch.randperm(count, generator=generator)
        labels = torch.arange(count).remainder(len(self.classes))[order]
        scans = pick(scans_of(split), torch.tensor(self.digits)[labels], generator)
        parts = zip(scans.split(_CHUNK), labels.split(_CHUNK), strict=True)
        images = [finish(self.paint(*part, generator), generator) for part in parts]
        return LabelledImages(torch.cat(images), labels, self.classes)


def ground(count: int, generator: torch.Generator) -> Tensor:
    """Backgrounds, dark to medium: float32 `[count, 3, 32, 32]`."""
    return texture(count, SIDE, generator, light=(0.1, 0.5), rough=0.12)


def any_colour(count: int, generator: torch.Generator) -> Tensor:
    """Bright colours of any hue: float32 `[count, 3]`, the largest channel 0.75 to 1."""
    colour = torch.rand(count, 3, generator=generator)
    return colour / colour.amax(dim=1, keepdim=True) * uniform((count, 1), 0.75, 1.0, generator)


def _big_ink(scans: Tensor, generator: torch.Generator, sizes: tuple[float, float]) -> Tensor:
    count = len(scans)
    centres = SIDE / 2 + uniform((count, 2), -3, 3, generator)
    size = uniform((count,), *sizes, generator)
    return write_ink(scans, centres, size, SIDE, generator, turn=0.25)


def _cover(below: Tensor, ink: Tensor, colours: Tensor) -> Tensor:
    return torch.lerp(below, colours[:, :, None, None], ink[:, None])


def _paint_digits(scans: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    ink = _big_ink(scans, generator, (20, 28))
    return _cover(ground(len(scans), generator), ink, any_colour(len(scans), generator))


def _paint_coloured(scans: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    ink = _big_ink(scans, generator, (18, 26))
    below = texture(len(scans), SIDE, generator, light=(0.08, 0.35), rough=0.1)
    return _cover(below, ink, mix(labels % len(COLOURS), generator))


def _paint_framed(scans: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    count = len(scans)
    ink = _big_ink(scans, generator, (14, 17))
    frames = draw_frames(labels % len(FRAMES), SIDE, generator)
    below = _cover(ground(count, generator), frames, any_colour(count, generator))
    return _cover(below, ink, any_colour(count, generator))


def _pairs(seconds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and digits of the classes (digit, second), the second running faster."""
    names = tuple(f"{second} {digit}" for digit in DIGITS for second in seconds)
    return names, tuple(digit for digit in range(len(DIGITS)) for _ in seconds)


SETS: dict[str, LabelledSet] = {
    "digits": LabelledSet(DIGITS, tuple(range(10)), _paint_digits, None, 1),
    "coloured": LabelledSet(*_pairs(tuple(c[0] for c in COLOURS)), _paint_coloured, None, 2),
    "framed": LabelledSet(*_pairs(FRAMES), _paint_framed, SHOTS, 3),
}


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
