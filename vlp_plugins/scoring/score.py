"""What a scorer is: a weight and what is known about it -> the importance of every element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from vlp_plugins.calibration.moments import Statistic
from vlp_plugins.runtime.errors import UnsupportedError, named_errors
from vlp_plugins.scoring.threshold import Cut

_SAFE = (2.0**-20, 2.0**20)


@dataclass(frozen=True)
class Evidence:
    """What a scorer may know about one weight besides its values.

    Attributes:
        name: canonical name of the weight.
        seed: seed of the run, for scorers that draw numbers.
        statistics: by statistic name the mean over samples, e.g. `input_second_moment`
            `[in_features]`, float64, already reduced over the weight's owners; of the loss the
            mean over batches, e.g. `mean_gradient` `[out * in_features]`, float32.
    """

    name: str
    seed: int = 0
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def every(self, n: int) -> Evidence:
        """What an elementwise scorer may know about every n-th element."""
        return replace(self, statistics={k: v[::n] for k, v in self.statistics.items()})


class Scorer(ABC):
    """One published score. Configuration lives in the instance, the formula in a function.

    Attributes:
        name: the name it is registered under.
        elementwise: True if the score of an element depends on that element alone, and statistics
            that it reads have one value per element; thresholds are then guessed from a sample,
            which saves time and changes nothing else.
        needs: the statistics that `Evidence` must hold; the data pass gathers them.
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = False
    needs: ClassVar[tuple[Statistic, ...]] = ()

    @abstractmethod
    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        """Importance of every element; smaller is pruned first.

        It is called for several weights at a time from different threads.

        Args:
            weight: `[out, in]`, any floating dtype, never modified.
            evidence: what is known about this weight.

        Returns:
            float32, same shape and device as `weight`, finite.
        """

    def neurons(
        self, weight: torch.Tensor, evidence: Evidence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance of a layer's whole outputs and inputs, for structured pruning.

        By default the mean of the scores of the elements of a row or column. Values of several
        layers are compared after each was brought to one scale, so only ratios matter.

        Args:
            weight: as for `score`.
            evidence: as for `score`.

        Returns:
            float32 of the rows `[out]` and of the columns `[in]`; smaller is pruned first.
        """
        scores = scores_of(self, weight, evidence)
        return scores.mean(1), scores.mean(0)


def scores_of(scorer: Scorer, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
    """What a scorer says of a weight, float32 of its shape.

    Raises:
        UnsupportedError: if it returns anything else, raises an error, or ends the program.
    """
    with named_errors(f"weight {evidence.name!r}: scorer {scorer.name!r}"):
        scores = scorer.score(weight, evidence)
    is_tensor = isinstance(scores, torch.Tensor)
    if not is_tensor or scores.shape != weight.shape or not scores.is_floating_point():
        what = type(scores).__name__
        if is_tensor:
            what = f"{str(scores.dtype).removeprefix('torch.')} of shape {list(scores.shape)}"
        raise UnsupportedError(
            f"scorer {scorer.name!r} returned {what} for weight {evidence.name!r}; a score is a "
            f"float32 tensor of the shape of the weight it is given, here {list(weight.shape)}"
        )
    if scores.data_ptr() == weight.data_ptr():
        scores = scores.clone()  # who gets the scores may write into them
    return scores.float()


def in_range(values: torch.Tensor) -> torch.Tensor:
    """Values of which products and squares neither underflow nor overflow in float32.

    For scores whose unit is the tensor's own.

    Args:
        values: not negative, of any shape and floating dtype.

    Returns:
        The same, or multiples whose largest is 1 where it is below 2^-20 or above 2^20.
    """
    largest = float(values.max()) if values.numel() else 0.0
    if largest == 0 or _SAFE[0] < largest < _SAFE[1]:
        return values
    return values / largest


class MagnitudeRanked(Scorer):
    """A score that grows with |w| within a tensor, so that masks can be cut at a magnitude."""

    @abstractmethod
    def global_cuts(
        self,
        weights: Mapping[str, torch.Tensor],
        removals: Sequence[int],
        factors: Mapping[str, float] | None = None,
    ) -> list[dict[str, Cut]]:
        """The global thresholds of this score, as cuts of |w|.

        Args:
            weights: `[out, in]` by canonical name.
            removals: how many elements to remove from all of them together, per cut.
            factors: by canonical name what multiplies the scores of a tensor, in (0, 1]; None: 1.
        """
