"""Downstream scenes: two to four digits, off the grid, in other shades on a textured ground."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from benchmarks.demo.captions import COLOURS
from benchmarks.demo.language import Fact
from benchmarks.demo.scans import Scans
from benchmarks.demo.scenes import CELL_SIZE, GRID, IMAGE_SIZE
from benchmarks.papers.downstream.painting import finish, texture, uniform, write_ink
from benchmarks.papers.downstream.shades import mix
from benchmarks.papers.downstream.splits import pick

FEWEST, MOST = 2, 4  # objects
DIGIT_SIZES = (11.5, 15.0)  # pixels
SHIFT = 1.8  # pixels that a centre is away from that of its cell
TURN = 0.2  # radians
_CHUNK = 500


@dataclass(frozen=True)
class Scenes:
    """Scenes without words.

    Attributes:
        images: uint8 `[n, 3, 48, 48]`.
        facts: what each shows.
    """

    images: Tensor
    facts: list[frozenset[Fact]]

    def __len__(self) -> int:
        return len(self.facts)


def draw(count: int, scans: Scans, generator: torch.Generator) -> Scenes:
    """Draw scenes of which no two share two objects: a caption is true of one of them only.

    Args:
        count: number of scenes.
        scans: handwriting to use.
        generator: source of every random choice.

    Raises:
        ValueError: if `count` is not positive, or so large that scenes must repeat each other.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    drawn = 2 * count + 16
    shape = (drawn, MOST)
    colours = torch.randint(len(COLOURS), shape, generator=generator)
    digits = torch.randint(10, shape, generator=generator)
    cells = torch.rand(drawn, GRID * GRID, generator=generator).argsort(dim=1)[:, :MOST]
    counts = torch.randint(FEWEST, MOST + 1, (drawn,), generator=generator)
    triples = torch.stack([colours, digits, cells], dim=2).tolist()
    facts = [
        [Fact(*triple) for triple in row[:number]]
        for row, number in zip(triples, counts.tolist(), strict=True)
    ]
    chosen = _without_common_pairs(facts)[:count]
    if len(chosen) < count:
        raise ValueError(f"{count:,} scenes would share pairs of objects; ask for fewer")
    rows = torch.tensor(chosen)
    images = [
        _render(pick(scans, digits[part], generator), colours[part], cells[part], counts[part],
                generator)
        for part in rows.split(_CHUNK)
    ]  # fmt: skip
    return Scenes(torch.cat(images), [frozenset(facts[index]) for index in chosen])


def _without_common_pairs(facts: list[list[Fact]]) -> list[int]:
    """Numbers of the scenes that share no two objects with an earlier one of them."""
    seen: set[tuple[Fact, ...]] = set()
    chosen = []
    for index, objects in enumerate(facts):
        pairs = set(combinations(sorted(objects), 2))
        if not pairs & seen:
            seen |= pairs
            chosen.append(index)
    return chosen


def _render(
    scans: Tensor, colours: Tensor, cells: Tensor, counts: Tensor, generator: torch.Generator
) -> Tensor:
    """Float32 scans `[n, 4, 8, 8]`, int64 `[n, 4]` twice and `[n]`; uint8 `[n, 3, 48, 48]`."""
    n = len(counts)
    centres = CELL_SIZE * (torch.stack([cells % GRID, cells // GRID], dim=2) + 0.5)
    centres = centres + uniform((n, MOST, 2), -SHIFT, SHIFT, generator)
    sizes = uniform((n * MOST,), *DIGIT_SIZES, generator)
    ink = write_ink(
        scans.flatten(0, 1), centres.flatten(0, 1), sizes, IMAGE_SIZE, generator, turn=TURN
    ).view(n, MOST, 1, IMAGE_SIZE, IMAGE_SIZE)
    ink = ink * (torch.arange(MOST) < counts[:, None])[:, :, None, None, None]
    shades = mix(colours, generator)[..., None, None]
    images = texture(n, IMAGE_SIZE, generator, light=(0.05, 0.3), rough=0.08).clamp(0, 1)
    for number in range(MOST):
        images = torch.lerp(images, shades[:, number], ink[:, number])
    return finish(images, generator)
