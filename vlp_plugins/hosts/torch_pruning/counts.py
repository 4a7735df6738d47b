"""How many heads, dimensions or units go, and which. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlp_plugins.runtime.errors import NonFiniteError, SparsityError


def removed_after(size: int, ratio: float, step: int, steps: int, round_to: int | None) -> int:
    """How many of a block are gone after a step.

    `int(ratio * step / steps * size)`, or fewer, so that what is left is a multiple of `round_to`.

    Args:
        size: how many there were.
        ratio: fraction removed in the end, in [0, 1).
        step: from 1.
        steps: number of steps.
        round_to: None for any number.
    """
    left = size - int(ratio * (step / steps) * size)
    return size - rounded_up(left, size, round_to)


def rounded_up(left: int, size: int, round_to: int | None) -> int:
    """The next multiple of `round_to`, but not more than there are."""
    return left if round_to is None else min(size, -(-left // round_to) * round_to)


def least(
    vectors: Sequence[Tensor], remove: int, *, floor: int = 1, round_to: int | None = None
) -> list[int]:
    """How many of each vector are among the least important of all; equal ones go by position.

    Args:
        vectors: float `[units]`, importance.
        remove: how many of all together.
        floor: how many stay of each vector at least.
        round_to: what stays of a vector from which something goes is a multiple of it; fewer go.

    Raises:
        SparsityError: if so many cannot go.
        NonFiniteError: if an importance is NaN or infinite.
    """
    spare = sum(max(0, len(vector) - floor) for vector in vectors)
    if remove > spare:
        total = sum(map(len, vectors))
        raise SparsityError(
            f"{remove} of {total} cannot be removed from {len(vectors)} blocks of which each keeps "
            f"at least {floor}; ask for at most {100 * spare // total / 100:g}"
        )
    everything = []
    for vector in vectors:
        check_finite(vector)
        values = vector.double().clone()
        values[values.argsort(stable=True)[max(0, len(values) - floor) :]] = torch.inf
        everything.append(values)
    owner = torch.cat([torch.full((len(v),), i, device="cpu") for i, v in enumerate(vectors)])
    chosen = owner[torch.cat(everything).argsort(stable=True)[:remove]]
    counts = torch.bincount(chosen, minlength=len(vectors)).tolist()
    return [
        len(vector) - rounded_up(len(vector) - count, len(vector), round_to)
        for vector, count in zip(vectors, counts, strict=True)
    ]


def check_finite(vector: Tensor) -> None:
    """Raises `NonFiniteError` if an importance is NaN or infinite."""
    if bad := int((~torch.isfinite(vector)).sum()):
        raise NonFiniteError(
            f"{bad} of {len(vector)} importances are NaN or infinite; look at what made them"
        )
