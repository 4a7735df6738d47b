"""How pre-training changes as it goes on: pure functions of progress (0 at first, 1 at the end).

Progress is a fraction of wall-clock time or of steps, so that a run given an hour makes the best
of it whatever else the machine is doing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PEAK_LEARNING_RATE = 1e-3
CHAT_PEAK_LEARNING_RATE = 1.5e-3
WARM_UP_STEPS = 150
SINGLE_AT_START = 0.75
SINGLE_UNTIL = 0.3
SMALL_BATCH_UNTIL = 0.35
MATCHING_FROM = 0.5
LOW_PRECISION_UNTIL = 0.85
ANSWERS_FROM = 0.04
NAMING_UNTIL = 0.7
NAMING_WEIGHT = 3.0


@dataclass
class Clock:
    """How far a run has come.

    Attributes:
        minutes: wall-clock length of the run, or None if it is counted in steps.
        steps: length in steps, or None.
        step: steps done.
        seconds: time spent on them, over all resumptions.
    """

    minutes: float | None
    steps: int | None
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """0 at the start, 1 or more when the run is over."""
        by_step = self.step / self.steps if self.steps else 0.0
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_step, by_time)


def learning_rate(step: int, progress: float, peak: float = PEAK_LEARNING_RATE) -> float:
    """Linear warm-up over steps, then half a cosine down to 1% of the peak over progress."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * warm_up * max(cosine, 0.01)


def single_fraction(progress: float) -> float:
    """Share of scenes with one object only: easy ones first, none after 30%."""
    return SINGLE_AT_START * max(0.0, 1 - progress / SINGLE_UNTIL)


def use_naming(progress: float) -> bool:
    """Whether the chat model's tower is told what is in a cell.

    For long: left alone with the decoder, which finds digits hardest, the projector drops them.
    """
    return progress < NAMING_UNTIL


def use_answers(progress: float) -> bool:
    """Whether the chat model's decoder learns: after the tower's first steps."""
    return progress >= ANSWERS_FROM


def caption_share(progress: float) -> float:
    """Share of captions among the chat model's conversations: answers first, which are easier."""
    return 0.2 + 0.3 * min(1.0, progress / SINGLE_UNTIL)


def batch_size(progress: float) -> int:
    """Many small steps first; later more pairs, which makes the contrast harder."""
    return 64 if progress < SMALL_BATCH_UNTIL else 128


def use_matching(step: int, progress: float) -> bool:
    """The matching loss, by far the dearest: every second step of the second half.

    Before, its hard negatives would be drawn by features that do not yet tell scenes apart.
    """
    return progress >= MATCHING_FROM and step % 2 == 0


def use_low_precision(progress: float) -> bool:
    """bfloat16 products but in the last part, which settles the weights in float32."""
    return progress < LOW_PRECISION_UNTIL
