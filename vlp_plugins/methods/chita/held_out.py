"""The loss of a model on held-out batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import distributed

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import batch_shard
from vlp_plugins.runtime.errors import NonFiniteError

logger = logging.getLogger("vlp_plugins.methods")


class HeldOut:
    """Batches that judge a pruned model. The same model gives the same loss every time.

    Several processes share the batches; all get the same mean.
    """

    def __init__(
        self, probe: LossProbe, batches: Sequence[Batch], first: int, *, skip_nonfinite: bool
    ) -> None:
        """Runs the dense model on them, to know which can be used.

        Args:
            probe: of the model, not attached.
            batches: on any device.
            first: index of the first of them in the calibration data, for messages and seeds.
            skip_nonfinite: leave out batches whose loss is not finite; otherwise they are an error.

        Raises:
            NonFiniteError: if the loss of the dense model on a batch, or on all, is not finite.
        """
        self._probe = probe
        self._batches = list(batches)
        self._first = first
        losses = self._losses()
        self._used = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
        bad = [first + index for index in range(len(losses)) if index not in self._used]
        if bad and (not skip_nonfinite or not self._used):
            raise NonFiniteError(
                f"the loss of the dense model on held-out batch {bad[0]} is NaN or infinite; look "
                "at that batch and at the checkpoint"
                + (", or leave such batches out with skip_nonfinite" if self._used else "")
            )
        for index in bad:
            logger.warning("left held-out batch %d out: its loss is not finite", index)
        self.dense = sum(losses[index] for index in self._used) / len(self._used)

    def mean_loss(self) -> float:
        """Of the model as it is now; NaN or infinite if it is on any batch."""
        losses = self._losses()
        return sum(losses[index] for index in self._used) / len(self._used)

    def _losses(self) -> list[float]:
        """Of every batch, the same list in every process."""
        rank, world = batch_shard(sharded=self._probe.sharded)
        mine: dict[int, float] = {}
        with self._probe.attached(()) as probe:
            for index, batch in enumerate(self._batches):
                if index % world == rank:
                    mine[index] = probe.loss(batch, self._first + index)
                else:
                    probe.advance(batch, self._first + index)
        found = [mine]
        if world > 1:
            found = [{} for _ in range(world)]
            distributed.all_gather_object(found, mine)
        together = {index: loss for part in found for index, loss in part.items()}
        return [together[index] for index in range(len(self._batches))]
