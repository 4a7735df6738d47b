"""What the benchmark finds out about one method in the hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vlp_plugins.adapter import Batch

NNI_TARGET = 3.0
"""Time through NNI over time alone, at full size; small models spend it on other things."""


@dataclass(frozen=True)
class Subject:
    """A model that is pruned.

    Attributes:
        name: `blip`, `xvlm`, `blip base`.
        model: makes a new one, always the same.
        batches: calibration batches.
        full_size: whether times are worth comparing.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: list[Batch]
    full_size: bool = False


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        subject: name of the model.
        method: registered name.
        alone_seconds: `prune` and `apply` without a host.
        nni_seconds: pruner, masks and plain model through NNI.
        identical: whether masks and all weights are bit for bit the same both ways.
        ties: whether every shared Parameter is one object afterwards.
        round_trip: whether `save_pretrained` and `from_pretrained` keep zeros and all values.
        torch_pruning: whether the method cuts the model as an importance of Torch-Pruning, so that
            the result equals the masked dense model; None if it was not asked.
        full_size: whether the ratio of times counts.
        notes: what went wrong.
    """

    subject: str
    method: str
    alone_seconds: float
    nni_seconds: float
    identical: bool
    ties: bool
    round_trip: bool
    torch_pruning: bool | None = None
    full_size: bool = False
    notes: str = ""

    @property
    def ratio(self) -> float:
        """Time through NNI over time alone."""
        return self.nni_seconds / self.alone_seconds

    @property
    def ok(self) -> bool:
        """Whether everything is as it shall be."""
        slow = self.full_size and self.ratio > NNI_TARGET
        held = self.identical and self.ties and self.round_trip
        return held and self.torch_pruning is not False and not slow

    def record(self) -> dict[str, Any]:
        """For the file of results."""
        return {**asdict(self), "ratio": self.ratio, "ok": self.ok}
