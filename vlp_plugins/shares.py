"""A number shared out in proportion, in whole parts with a least and a most: water-filling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BISECTIONS = 200


def shares(
    total: int, proportions: Sequence[float], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """Whole numbers that sum to `total`, as near to the proportions as the bounds allow.

    Each is `level * proportion`, no less than its least and no more than its most, with one level
    for all. Fractions are rounded down; what is missing then goes to the largest of them, among
    equals to the first.

    Args:
        total: from the sum of `least` to the sum of `most`.
        proportions: above 0.
        least: lower bounds.
        most: upper bounds, no smaller.

    Raises:
        ValueError: if the total is outside these sums.
    """
    low_bounds, high_bounds = np.array(least, dtype=np.int64), np.array(most, dtype=np.int64)
    if not low_bounds.sum() <= total <= high_bounds.sum():
        raise ValueError(f"{total} is not between {low_bounds.sum()} and {high_bounds.sum()}")
    each = np.array(proportions, dtype=np.float64)

    def filled(level: float) -> np.ndarray:
        return np.clip(level * each, low_bounds, high_bounds)

    low, high = 0.0, float((high_bounds / each).max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if filled(middle).sum() > total:
            high = middle
        else:
            low = middle
    exact = filled(low)
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    while (missing := total - int(whole.sum())) > 0:
        room = order[whole[order] < high_bounds[order]][:missing]
        whole[room] += 1
    return whole.tolist()
