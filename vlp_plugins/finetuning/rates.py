"""How the learning rate rises and falls. Pure functions of the step.

A step is counted from 0, and every step trains: the first of a warm-up of w steps has 1/w of the
rate, and the last one of all is not at zero. The originals differ in that: X-VLM's first step has
rate 0, and BLIP lowers its rate once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from vlp_plugins.runtime.errors import RecipeError, suggest

Rate = Callable[[float], float]
"""Fraction of the steps after the warm-up that is done -> fraction of the highest rate."""


def cosine(done: float) -> float:
    """Half a period of a cosine from 1 to 0 (Loshchilov & Hutter, SGDR, ICLR 2017, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - done


def constant(done: float) -> float:  # noqa: ARG001 - a Rate
    """1 throughout."""
    return 1.0


RATES: Mapping[str, Rate] = {"cosine": cosine, "linear": linear, "constant": constant}


def rate_by_name(name: str) -> Rate:
    """`cosine`, `linear` or `constant`.

    Raises:
        RecipeError: for anything else.
    """
    if name not in RATES:
        raise RecipeError(f"unknown schedule {name!r}{suggest(name, list(RATES))}")
    return RATES[name]


def factor(step: int, steps: int, *, schedule: str, warmup: float = 0.0) -> float:
    """Fraction of the highest learning rate that a step has.

    Args:
        step: from 0.
        steps: how many there are.
        schedule: of the steps after the warm-up.
        warmup: fraction of the steps in which the rate rises on a straight line, rounded down.

    Raises:
        RecipeError: if there is no such schedule.
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return rate_by_name(schedule)((step - rise) / (steps - rise))
