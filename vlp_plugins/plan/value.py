"""What a plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.dimension.plan import IdPlan
from vlp_plugins.masks.manifest import Count
from vlp_plugins.methods.method import Cost
from vlp_plugins.models.weights import WeightMap


@dataclass(frozen=True)
class Measuring:
    """What measuring intrinsic dimensions will take.

    Attributes:
        plan: passes and bytes.
        seconds_per_batch: of a made-up batch, forward only and with the outputs looked at.
    """

    plan: IdPlan
    seconds_per_batch: float

    @property
    def seconds(self) -> float:
        """Of the forward passes; the search for neighbours comes on top."""
        return len(self.plan.passes) * self.plan.batches * self.seconds_per_batch


@dataclass(frozen=True)
class Plan:
    """The answer of `vlp plan`; bytes and seconds.

    Attributes:
        weights: the prunable weights.
        counts: for every target by modality and under `all` what the run will remove and keep,
            exact; without modalities if it depends on data how they share the sparsity.
        passes: passes over the data.
        peak_bytes: expected peak of the whole process in RAM.
        device_peak_bytes: expected peak of tensors on the GPU; None without one.
        model_bytes: parameters of the model, each shared one counted once.
        statistics_bytes: accumulators; 0 for a method that gathers none.
        masks_bytes: packed masks of all sparsities.
        seconds_per_batch: of a made-up batch; None for a method without data, and for one whose
            batches cannot be timed without running it.
        cost: of a method that runs the model as it goes.
        measuring: of the intrinsic dimensions that the method needs first; None for none.
    """

    weights: WeightMap
    counts: Sequence[Mapping[str, Count]]
    passes: int
    peak_bytes: int
    device_peak_bytes: int | None
    model_bytes: int
    statistics_bytes: int
    masks_bytes: int
    seconds_per_batch: float | None
    cost: Cost | None = None
    measuring: Measuring | None = None

    @property
    def seconds(self) -> float | None:
        """Of the whole work of a method that takes gradients as it goes; None for others."""
        if self.cost is None or self.seconds_per_batch is None:
            return None
        return self.cost.gradient_batches * self.seconds_per_batch + self.cost.seconds
