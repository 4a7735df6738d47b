"""What a statistic is: something small that a data pass accumulates for a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """Where a statistic is taken: one use of one weight in one stream.

    Attributes:
        weight: canonical name.
        stream: name of the stream of the activation probe.
        owner: index of the module among the weight's owners; 0 is the published owner.
    """

    weight: str
    stream: str
    owner: int

    def __str__(self) -> str:
        return f"{self.weight}|{self.stream}|{self.owner}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Inverse of `str`."""
        weight, stream, owner = text.rsplit("|", 2)
        return cls(weight, stream, int(owner))


Key = tuple[str, Site]
"""Statistic name and site: what a sum is found by."""


class ActivationStatistic(ABC):
    """A statistic of the inputs of a weight, additive over batches.

    Being additive is what makes the pass streaming, resumable and equal on any number of
    processes: accumulators are float64 sums of per-batch values.

    Attributes:
        name: what its sums are kept and found by, in files, too. It must tell every parameter that
            changes the values (`f"input_power_{p}"`, set in `__init__`): statistics of one name
            share one set of sums. Without `|`.
    """

    name: str

    @abstractmethod
    def size(self, weight: Weight) -> int:
        """Length of the accumulator of one site of `weight`."""

    @abstractmethod
    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        """The contribution of one call.

        Args:
            inputs: `[tokens, in_features]`, the real tokens that entered the layer, in the
                model's dtype.

        Returns:
            `[size]` in float32 (summed in float64 by the caller).
        """


class LossStatistic(ABC):
    """A statistic of the gradients of the pre-training loss, additive over batches.

    Attributes:
        name: see `ActivationStatistic.name`.
    """

    name: str

    @abstractmethod
    def size(self, weight: Weight) -> int:
        """Length of the accumulator of `weight`."""

    @abstractmethod
    def measure(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The contribution of one batch.

        Args:
            weight: detached, of the parameter's shape.
            gradient: of the batch's loss by the weight, summed over all uses of the weight, same
                shape, float32.

        Returns:
            `[size]`, float32 (summed in float64 by the caller); may be a view of `gradient`.
        """


Statistic = ActivationStatistic | LossStatistic
_Kind = TypeVar("_Kind", bound=Statistic)

LOSS_STREAM = "loss"
"""Stream of the sites of loss statistics: one per weight, whoever uses it."""


def distinct(statistics: Iterable[_Kind]) -> tuple[_Kind, ...]:
    """Each statistic once, by its name.

    Raises:
        UnsupportedError: if two of one name are not the same.
    """
    found: dict[str, _Kind] = {}
    for statistic in statistics:
        known = found.setdefault(statistic.name, statistic)
        if known is not statistic and _identity(known) != _identity(statistic):
            raise UnsupportedError(
                f"two statistics are called {statistic.name!r}, but one is {_described(known)} and "
                f"one {_described(statistic)}; the name of a statistic must tell its parameters"
            )
    return tuple(found.values())


def _identity(statistic: Statistic) -> tuple[type, dict[str, object]]:
    return type(statistic), getattr(statistic, "__dict__", {})


def _described(statistic: Statistic) -> str:
    kind, parameters = _identity(statistic)
    return f"{kind.__name__}({', '.join(f'{k}={v!r}' for k, v in parameters.items())})"
