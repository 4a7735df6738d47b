"""Importance of the rows and columns of one weight, of what is left of it after cuts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlp_plugins.calibration.statistic import ActivationStatistic, Statistic
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.score import Evidence, Scorer

Reduction = Literal["mean", "max", "sum"]


@dataclass(frozen=True)
class Section:
    """What is left of a weight, in coordinates of the weight that was scored.

    Attributes:
        rows: int64, ascending.
        columns: int64, ascending; of a convolution elements of `[in * height * width]`.
        shape: `[out, in]` of the weight that was scored.
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @property
    def whole(self) -> bool:
        """True if nothing is gone."""
        return (len(self.rows), len(self.columns)) == self.shape

    def of_matrix(self, values: Tensor) -> Tensor:
        """What is left of one value per element, flat as it was given."""
        matrix = values.view(self.shape)
        return matrix[self.rows][:, self.columns].flatten()


class Vectors(ABC):
    """Scores one weight again and again, while it gets smaller and is trained."""

    @abstractmethod
    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        """Importance of rows and columns.

        Args:
            weight: detached `[rows, columns]`, what is left of the weight, as it is now.
            section: which rows and columns these are.

        Returns:
            float32 `[rows]` and `[columns]`.
        """


@dataclass(frozen=True)
class Scored(Vectors):
    """By a score, from the current weight and what was measured of the dense one.

    Attributes:
        scorer: whose `neurons` are asked.
        evidence: of the dense weight; statistics are cut as the weight is.
        needs: the statistics in it.
        neurons: False averages the scores of elements where a score has its own way of scoring
            rows and columns.
    """

    scorer: Scorer
    evidence: Evidence
    needs: tuple[Statistic, ...]
    neurons: bool = True

    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        evidence = self.evidence if section.whole else self._cut(section)
        if self.neurons:
            return self.scorer.neurons(weight, evidence)
        return Scorer.neurons(self.scorer, weight, evidence)

    def _cut(self, section: Section) -> Evidence:
        found = {
            each.name: _cut(each, self.evidence.statistics[each.name], section)
            for each in self.needs
        }
        first = int(section.rows[0])
        # Parts of one fused weight are not drawn alike by a score that draws by name.
        name = f"{self.evidence.name}[{first}]" if first else self.evidence.name
        return replace(self.evidence, name=name, statistics=found)


@dataclass(frozen=True)
class Fixed(Vectors):
    """By scores of elements that a procedure left, whatever became of the weight since.

    Attributes:
        scores: float32 `[out, in]`.
    """

    scores: Tensor

    def __call__(self, weight: Tensor, section: Section) -> tuple[Tensor, Tensor]:
        scores = self.scores if section.whole else self.scores[section.rows][:, section.columns]
        return scores.mean(1), scores.mean(0)


def _cut(statistic: Statistic, values: Tensor, section: Section) -> Tensor:
    """What is left of a statistic of a weight of which this is left.

    Raises:
        UnsupportedError: if its values belong to neither inputs nor elements.
    """
    outputs, inputs = section.shape
    if isinstance(statistic, ActivationStatistic):
        if values.numel() == inputs:
            return values[section.columns]
        if values.numel() == inputs * inputs:
            square = values.view(inputs, inputs)
            return square[section.columns][:, section.columns].flatten()
    elif values.numel() == outputs * inputs:
        return section.of_matrix(values)
    raise UnsupportedError(
        f"statistic {statistic.name!r} has {values.numel()} values for a weight of {outputs} x "
        f"{inputs}, so it cannot follow rows and columns that are cut; prune in one step, or call "
        "refresh() of the importance after each"
    )


def normalised(values: Tensor, how: str | None) -> Tensor:
    """A vector on a scale that layers share; all zeros stay so.

    Args:
        values: not negative.
        how: `mean` or `max` becomes 1, `sum` likewise, None leaves it as it is.
    """
    if how is None:
        return values
    scale = values.max() if how == "max" else values.sum()
    if how == "mean":
        scale = scale / len(values)
    return values / scale if bool(scale > 0) else values


def reduced(vectors: Sequence[Tensor], how: Reduction) -> Tensor:
    """One vector of several of one length: their `mean`, `max` or `sum`."""
    stacked = torch.stack(list(vectors))
    if how == "max":
        return stacked.amax(0)
    return stacked.mean(0) if how == "mean" else stacked.sum(0)


def check_words(normalize: str | None, reduction: str) -> None:
    """Raises `UnsupportedError` for words that `normalised` or `reduced` do not know."""
    if normalize not in ("mean", "max", "sum", None):
        raise UnsupportedError(f"normalize={normalize!r} is none of mean, max, sum, None")
    if reduction not in ("mean", "max", "sum"):
        raise UnsupportedError(f"reduction={reduction!r} is none of mean, max, sum")
