"""When masks are chosen while training, and how much they remove then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlp_plugins.models.request import Target, whole_number
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.scoring.schedules import at_step, schedule_by_name


@dataclass(frozen=True)
class Timetable:
    """Steps of an optimizer, counted from 1.

    For the first `before` steps nothing is removed, while the scores look on. Then masks are chosen
    after every step that `every` divides, the last time after step `steps - after`, when they have
    the target sparsity exactly; for the rest of the steps they stay as they are.

    Attributes:
        steps: number of steps.
        before: initial warm-up.
        after: final warm-up, while the weights that are left recover.
        every: steps from one choice to the next.
        schedule: name of the schedule of the rise; see `vlp_plugins.schedules`.
    """

    steps: int
    before: int = 0
    after: int = 0
    every: int = 10
    schedule: str = "cubic"

    def __post_init__(self) -> None:
        for name in ("steps", "before", "after", "every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.every < 1:
            raise SparsityError(f"every={self.every}; masks are chosen every 1 or more steps")
        self.level(0.0, 0)  # says what is wrong with the others

    @property
    def last(self) -> int:
        """The step after which masks are chosen for the last time."""
        return self.steps - self.after

    def window_ends(self, step: int) -> bool:
        """Whether what was seen since the last window is folded into the scores after a step."""
        return step <= self.last and (step % self.every == 0 or step == self.last)

    def chooses(self, step: int) -> bool:
        """Whether masks are chosen after a step."""
        return step > self.before and self.window_ends(step)

    def level(self, target: Target, step: int) -> Target:
        """The sparsity that masks have after a step, by modality if the target is."""
        rise = schedule_by_name(self.schedule)

        def reached(value: float) -> float:
            return at_step(
                step,
                self.steps,
                value,
                before=self.before,
                after=self.after,
                schedule=rise,
            )

        if isinstance(target, Mapping):
            return {name: reached(value) for name, value in target.items()}
        return reached(target)

    def record(self) -> dict[str, Any]:
        """What the manifest of masks says about it."""
        return {
            "steps": self.steps,
            "warmup": [self.before, self.after],
            "every": self.every,
            "schedule": self.schedule,
        }


def default_warmup(steps: int) -> tuple[int, int]:
    """A twentieth of the steps before and a quarter after, as in PLATON's longest runs.

    5,400 and 27,000 of 98,000 steps on MNLI.
    """
    return steps // 20, steps // 4
