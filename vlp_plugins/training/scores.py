"""The scores that a training loop can feed, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlp_plugins.runtime.errors import UnknownNameError, suggest
from vlp_plugins.training.base import TrainingScore
from vlp_plugins.training.magnitude import CurrentMagnitude
from vlp_plugins.training.platon import Platon
from vlp_plugins.training.taylor import Taylor

SCORES: Mapping[str, Callable[[], TrainingScore]] = {
    score.name: score for score in (CurrentMagnitude, Taylor, Platon)
}


def training_score(score: str | TrainingScore) -> TrainingScore:
    """A score itself, or by its name: `magnitude`, `taylor` or `platon`.

    Raises:
        UnknownNameError: for another name.
    """
    if isinstance(score, TrainingScore):
        return score
    if score not in SCORES:
        raise UnknownNameError(
            f"no score named {score!r} can be fed by a training loop{suggest(score, list(SCORES))}"
        )
    return SCORES[score]()
