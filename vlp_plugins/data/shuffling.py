"""Mixes a stream whose length nobody knows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

BUFFER = 1000


def buffered(stream: Iterable[Item], seed: int, size: int = BUFFER) -> Iterator[Item]:
    """Yields every item once, each drawn at random from a buffer that the stream refills.

    Args:
        stream: what to mix.
        seed: same seed and stream, same order. No global random state is touched.
        size: how many items wait in memory.
    """
    rng = random.Random(seed)
    waiting: list[Item] = []
    for item in stream:
        if len(waiting) < size:
            waiting.append(item)
            continue
        place = rng.randrange(size)
        yield waiting[place]
        waiting[place] = item
    rng.shuffle(waiting)
    yield from waiting
