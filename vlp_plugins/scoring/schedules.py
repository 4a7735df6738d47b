"""Schedules: how sparsity rises from round to round of an iterative method. Pure functions.

A schedule takes the index of a round from 0, the number of rounds and the target, and returns the
sparsity after that round; `at_step` makes one of training steps. All end exactly at the target. The
published MULTIFLOW code computes its `linear` schedule as s + (1 - s) (t + 1) / T, which removes
everything in the last round whatever the target (quirk general-G8); that is not shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlp_plugins.models.request import Target
from vlp_plugins.runtime.errors import SparsityError, suggest

Schedule = Callable[[int, int, float], float]
"""(round from 0, number of rounds, target) -> sparsity after that round."""


def exponential(index: int, rounds: int, target: float) -> float:
    """1 - (1 - s)^((t + 1) / T): every round removes the same fraction of what is left.

    The `exp` schedule of the published MULTIFLOW code, for IterSNIP and CHITA++.
    """
    if index + 1 == rounds:
        return target  # the power rounds
    return 1 - (1 - target) ** ((index + 1) / rounds)


def linear(index: int, rounds: int, target: float) -> float:
    """Every round removes equally many: s (t + 1) / T."""
    return target if index + 1 == rounds else target * (index + 1) / rounds


def constant(index: int, rounds: int, target: float) -> float:  # noqa: ARG001 - a Schedule
    """All at once, s; later rounds change only what a method changes besides masks."""
    return target


def cubic(index: int, rounds: int, target: float) -> float:
    """Many at first, while there are many to spare: s (1 - (1 - (t + 1) / T)^3).

    Zhu & Gupta, "To prune, or not to prune" (ICLR 2018 workshop), equation 1 with initial
    sparsity 0.
    """
    return target * (1 - (1 - (index + 1) / rounds) ** 3)


def at_step(
    step: int,
    steps: int,
    target: float,
    *,
    before: int = 0,
    after: int = 0,
    schedule: Schedule = cubic,
) -> float:
    """Sparsity after a training step: 0 for some steps, then the schedule, then the target.

    With `cubic` it is s (1 - (1 - (t - t_i) / (T - t_i - t_f))^3) for t_i < t <= T - t_f: Sanh et
    al., "Movement Pruning" (NeurIPS 2020), and Zhang et al., "PLATON" (ICML 2022).

    Args:
        step: how many steps are done.
        steps: how many there are, T.
        target: s, reached exactly at step T - t_f.
        before: t_i, the steps of the initial warm-up.
        after: t_f, the steps of the final warm-up.
        schedule: of the rise between them.

    Raises:
        SparsityError: if the warm-ups leave no step for the rise, or are negative.
    """
    rounds = steps - before - after
    if rounds < 1 or before < 0 or after < 0:
        raise SparsityError(
            f"of {steps} steps, warm-ups of {before} and {after} leave {rounds} for the sparsity "
            "to rise in; both are 0 or more and leave at least 1"
        )
    if step <= before:
        return 0.0
    return target if step >= steps - after else schedule(step - before - 1, rounds, target)


SCHEDULES: Mapping[str, Schedule] = {
    "exp": exponential,
    "exponential": exponential,
    "linear": linear,
    "const": constant,
    "constant": constant,
    "cubic": cubic,
}


def schedule_by_name(name: str) -> Schedule:
    """`exp` or `exponential`, `linear`, `const` or `constant`, `cubic`.

    Raises:
        SparsityError: for anything else.
    """
    if name not in SCHEDULES:
        raise SparsityError(f"unknown schedule {name!r}{suggest(name, list(SCHEDULES))}")
    return SCHEDULES[name]


def levels_of(target: Target, schedule: str, rounds: int) -> list[Target]:
    """The sparsity after every round; the last is the target itself.

    Args:
        target: a sparsity, or one per modality, each of which then follows the schedule.
        schedule: name of the schedule.
        rounds: number of rounds.

    Raises:
        SparsityError: if there is no such schedule, or no round.
    """
    rise = schedule_by_name(schedule)
    if rounds < 1:
        raise SparsityError(f"rounds={rounds}; a schedule has 1 round or more")

    def after(index: int) -> Target:
        return level_of(target, lambda value: rise(index, rounds, value))

    return [after(index) for index in range(rounds)]


def level_of(target: Target, level: Callable[[float], float]) -> Target:
    """The level of a sparsity, or of each if there is one per modality."""
    if isinstance(target, Mapping):
        return {name: level(value) for name, value in target.items()}
    return level(target)
