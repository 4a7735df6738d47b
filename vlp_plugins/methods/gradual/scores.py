"""Scores that a training loop feeds, step after step: magnitude, Taylor, PLATON."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError, suggest
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.snip import snip

State = dict[str, torch.Tensor]
"""What a score remembers of one weight: float32 `[numel]` by name."""


class TrainingScore(Scorer):
    """A score of weights and their gradients at many steps of a training.

    Every step gives a sample per element; the mean over the steps of a window, from one choice of
    masks to the next, is folded into the state; `score` ranks by it, and finds the state among the
    statistics of its evidence.

    Attributes:
        reads_gradients: whether there are samples; False for a score of the weights alone.
        remembers: the names of what `fold` keeps.
    """

    elementwise: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """What was set, for the manifest of masks."""
        return {}

    def sample(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What one step says about every element: |w g|, unless a score says otherwise.

        Args:
            weight: before the step, any shape and floating dtype; not to be modified.
            gradient: of the loss by it, same shape, float32.

        Returns:
            float32, same shape, a new tensor.
        """
        return snip(weight, gradient)

    @abstractmethod
    def fold(self, state: State, sample: torch.Tensor) -> None:
        """Takes the mean sample of a window into the state, in place.

        Args:
            state: of one weight; empty at first.
            sample: float32 `[numel]`; may be kept or overwritten.
        """


class CurrentMagnitude(TrainingScore):
    """Zhu & Gupta, "To prune, or not to prune" (ICLR 2018 workshop): |w| whenever masks are chosen.

    It remembers nothing and reads no gradients.
    """

    name: ClassVar[str] = "magnitude"
    reads_gradients: ClassVar[bool] = False

    def fold(self, state: State, sample: torch.Tensor) -> None:
        """There is nothing to remember."""

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return weight.float().abs()


BETA1 = 0.85
BETA2 = 0.95
"""The published defaults; some published runs at higher sparsity take a lower one, down to 0.65."""
MEAN = "sensitivity"
SPREAD = "uncertainty"


def smooth(
    mean: torch.Tensor, spread: torch.Tensor, sample: torch.Tensor, beta1: float, beta2: float
) -> None:
    """One step of both moving averages, in place.

    I' = b1 I' + (1 - b1) I, then U' = b2 U' + (1 - b2) |I - I'|.

    Args:
        mean: I', smoothed sensitivity.
        spread: U', smoothed uncertainty, same shape.
        sample: I, the sensitivity now; overwritten.
        beta1: b1.
        beta2: b2.
    """
    mean.mul_(beta1).add_(sample, alpha=1 - beta1)
    spread.mul_(beta2).add_(sample.sub_(mean).abs_(), alpha=1 - beta2)


@dataclass(frozen=True)
class Platon(TrainingScore):
    """Zhang et al., "PLATON" (ICML 2022): I' U'.

    I = |w g| of the weight and gradient of a step; I' and U' are `smooth`ed. A weight of little
    importance stays if little is known about it. Samples are averaged over the steps of a window
    first, as the published code does, so that `every` steps are one step of the averages. That
    code multiplies the gradient with the weight after the step; here it is the weight that the
    gradient was taken at, as in the paper.

    The averages start at 0 and are not corrected for it: that is a factor common to all elements.

    Attributes:
        beta1: of the sensitivity, in [0, 1).
        beta2: of the uncertainty, in [0, 1).
    """

    beta1: float = BETA1
    beta2: float = BETA2

    name: ClassVar[str] = "platon"
    remembers: ClassVar[tuple[str, ...]] = (MEAN, SPREAD)

    def __post_init__(self) -> None:
        for key, beta in self.parameters.items():
            if not 0 <= beta < 1:
                raise UnsupportedError(f"{key}={beta}; a smoothing factor lies in [0, 1)")

    @property
    def parameters(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2}

    def fold(self, state: State, sample: torch.Tensor) -> None:
        for key in self.remembers:
            if key not in state:
                state[key] = torch.zeros_like(sample)
        smooth(state[MEAN], state[SPREAD], sample, self.beta1, self.beta2)

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        known = evidence.statistics
        return torch.mul(known[MEAN], known[SPREAD]).reshape(weight.shape)


IMPORTANCE = "importance"


class Taylor(TrainingScore):
    """Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).

    The mean of |w g| over the steps since masks were last chosen, as they average over the
    mini-batches between two prunings; of single elements, with the absolute value instead of its
    square, as PLATON's comparison has it. With `every=1` it is |w g| of one step alone. Nothing
    older counts: what is smoothed over all steps is PLATON.

    The one-shot score of this name, |w g| of the mean gradient of a model that is not trained, is
    the method `snip`.
    """

    name: ClassVar[str] = "taylor"
    remembers: ClassVar[tuple[str, ...]] = (IMPORTANCE,)

    def fold(self, state: State, sample: torch.Tensor) -> None:
        state[IMPORTANCE] = sample

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return evidence.statistics[IMPORTANCE].reshape(weight.shape)


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
