"""What Torch-Pruning must be told so that it removes exact counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from vlp_plugins.hosts.torch_pruning.counts import removed_after
from vlp_plugins.hosts.torch_pruning.planning import Plan


class Steps(float):
    """A ratio that knows what Torch-Pruning must be told at each step, so that counts are exact.

    Attributes:
        told: at step 0 (before the first), 1, ...
    """

    told: tuple[float, ...]

    def __new__(cls, ratio: float, told: Iterable[float]) -> Steps:
        made = super().__new__(cls, ratio)
        made.told = (0.0, *told)
        return made


def units_told(size: int, ratio: float, plan: Plan) -> Steps:
    """Torch-Pruning leaves `int(size * (1 - told))`; half a unit keeps rounding errors away."""
    round_to = plan.round_to if plan.scope == "layer" else None
    gone = [removed_after(size, ratio, t + 1, plan.steps, round_to) for t in range(plan.steps)]
    return Steps(ratio, [(k - 0.5) / size if k else 0.0 for k in gone])


def heads_told(size: int, ratio: float, plan: Plan) -> Steps:
    """Torch-Pruning removes `ceil(told * heads)` of the heads that are left at each step."""
    gone = [removed_after(size, ratio, t, plan.steps, None) for t in range(plan.steps + 1)]
    return Steps(
        ratio,
        [
            (after - before - 0.5) / (size - before) if after > before else 0.0
            for before, after in pairwise(gone)
        ],
    )


def told_at_steps(ratio: float, steps: int) -> Sequence[float]:
    """Torch-Pruning's scheduler: the ratio of each step, from step 0."""
    return ratio.told if isinstance(ratio, Steps) else linear_scheduler(ratio, steps)
