"""The methods `platon` and `taylor`: gradual pruning with a training loop of their own."""

from __future__ import annotations

from vlp_plugins.training.platon import BETA1, BETA2, Platon
from vlp_plugins.training.procedure import LEARNING_RATE, PruningWhileTraining
from vlp_plugins.training.taylor import Taylor

TAYLOR_EVERY = 4
"""Its samples are averaged from one choice to the next; PLATON smooths over all steps anyway."""


def platon(
    *,
    steps: int | None = None,
    lr: float = LEARNING_RATE,
    warmup: tuple[float, float] | None = None,
    every: int = 1,
    revive: bool = True,
    schedule: str = "cubic",
    beta1: float = BETA1,
    beta2: float = BETA2,
) -> PruningWhileTraining:
    """PLATON (Zhang et al., ICML 2022) with a training loop of its own.

    Args:
        steps: see `PruningWhileTraining`, as all but the last two.
        lr: learning rate of the first step.
        warmup: fractions of the steps at the start and at the end.
        every: steps from one choice of masks to the next.
        revive: whether removed weights may come back.
        schedule: how the sparsity rises.
        beta1: of the smoothed sensitivity.
        beta2: of the smoothed uncertainty.
    """
    score = Platon(beta1, beta2)
    return PruningWhileTraining(score, steps, lr, warmup, every, revive, schedule)


def taylor(
    *,
    steps: int | None = None,
    lr: float = LEARNING_RATE,
    warmup: tuple[float, float] | None = None,
    every: int = TAYLOR_EVERY,
    revive: bool = True,
    schedule: str = "cubic",
) -> PruningWhileTraining:
    """First-order Taylor pruning (Molchanov et al., CVPR 2019) with a training loop of its own.

    The score of a model that is not trained, in one shot, is the method `snip`.

    Args:
        steps: see `PruningWhileTraining`, as all.
        lr: learning rate of the first step.
        warmup: fractions of the steps at the start and at the end.
        every: steps from one choice of masks to the next.
        revive: whether removed weights may come back.
        schedule: how the sparsity rises.
    """
    return PruningWhileTraining(Taylor(), steps, lr, warmup, every, revive, schedule)
