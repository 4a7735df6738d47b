"""What the data pass measures of one batch, by whichever probes the statistics need."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.large_sums import LargeSums
from vlp_plugins.calibration.loss_probe import LossProbe
from vlp_plugins.calibration.probe import ActivationProbe
from vlp_plugins.calibration.watching import check_reached, named
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError
from vlp_plugins.runtime.sharding import at_rest, is_sharded, whole
from vlp_plugins.statistics.base import (
    LOSS_STREAM,
    ActivationStatistic,
    Key,
    LossStatistic,
    Site,
    Statistic,
    distinct,
)

logger = logging.getLogger("vlp_plugins.calibration")


@dataclass(frozen=True)
class Measured:
    """What one batch gave.

    Attributes:
        values: of activation statistics, float64 `[size]` on CPU.
        gradients: by canonical name, for loss statistics.
    """

    values: Mapping[Key, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


class Measuring:
    """Each probe that the statistics need, run once per batch."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        weights: WeightMap,
        statistics: Sequence[Statistic],
        *,
        published: bool = False,
        autocast: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        keep_state: bool = False,
    ) -> None:
        every = distinct(statistics)
        activations = [s for s in every if isinstance(s, ActivationStatistic)]
        self._losses = [s for s in every if isinstance(s, LossStatistic)]
        self._weights = weights
        self._adapter = adapter
        at_rest(model)
        self._sharded = is_sharded(model.parameters())
        self._device = next(model.parameters()).device
        self._skip = skip_nonfinite
        self._keep_state = keep_state
        self._activation_probe = None
        if activations or not self._losses:
            self._activation_probe = ActivationProbe(
                model, adapter, weights, activations, published=published
            )
        self._loss_probe = None
        if self._losses:
            self._loss_probe = LossProbe(
                model,
                adapter,
                weights,
                published=published,
                autocast=autocast,
                skip_nonfinite=skip_nonfinite,
            )

    @contextmanager
    def attached(self) -> Iterator[Measuring]:
        """The model ready to be measured; as it was found on leaving."""
        with ExitStack() as stack:
            if self._activation_probe is not None:
                stack.enter_context(self._activation_probe.attached())
            if self._loss_probe is not None:
                stack.enter_context(self._loss_probe.attached(keep_state=self._keep_state))
            yield self

    def measure(self, batch: Batch, index: int) -> Measured | None:
        """Runs the probes; None if the batch is left out because it holds NaN or infinity.

        Args:
            batch: as the loader made it.
            index: of the batch, for messages.
        """
        batch = to_device(batch, self._device)
        gradients: Mapping[str, torch.Tensor] = {}
        values: Mapping[Key, torch.Tensor] = {}
        # The loss first: it must change its state as it does in processes that only advance.
        if self._loss_probe is not None:
            found = self._loss_probe.measure(batch, index)
            if found is None:
                return None
            gradients = found
        if self._activation_probe is not None:
            try:
                values = self._activation_probe.measure(batch, index)
            except NonFiniteError as error:
                if not self._skip:
                    raise
                logger.warning("left batch %d out: %s", index, error)
                return None
        return Measured(values, gradients)

    def advance(self, batch: Batch, index: int) -> None:
        """Passes over a batch that is not measured here."""
        if self._loss_probe is not None:
            self._loss_probe.advance(batch, index)

    @property
    def sharded(self) -> bool:
        """Whether the model is shared out among processes, which then run every batch together."""
        return self._sharded

    def add(self, measured: Measured, sums: LargeSums | None, half: int) -> None:
        """Adds what loss statistics make of the gradients of a batch.

        Args:
            measured: what the batch gave.
            sums: changed in place; None if another process adds them up, for whose sake sharded
                gradients are gathered all the same.
            half: 0 or 1.
        """
        for name, gradient in measured.gradients.items():
            # One at a time: of a sharded model, gradients and weights never exist whole together.
            weight, gradient = whole(self._weights[name].parameter), whole(gradient)
            if sums is None:
                continue
            for statistic in self._losses:
                key = (statistic.name, Site(name, LOSS_STREAM, 0))
                sums.add(key, statistic.measure(weight, gradient), half)

    def check_reached(self, sums: Mapping[Key, torch.Tensor]) -> None:
        """Raises `StatisticsError` if a weight was reached by no stream, or not by the loss."""
        by_loss = {site.weight for _, site in sums if site.stream == LOSS_STREAM}
        by_stream = {site.weight for _, site in sums if site.stream != LOSS_STREAM}
        if self._activation_probe is not None and self._activation_probe.measures:
            check_reached(self._adapter, self._weights, by_stream)
        missed = [name for name in self._weights if name not in by_loss]
        if self._losses and missed:
            raise StatisticsError(
                f"the loss of adapter {self._adapter.name!r} does not depend on "
                f"{named(self._weights, missed)}; exclude it (with ModuleAdapter: exclude=...), "
                "give a loss that uses the whole model, or a method without gradients"
            )
