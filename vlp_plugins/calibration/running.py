"""A data pass under way: takes batch after batch, and writes its state now and then."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from vlp_plugins.calibration.batches import batch_size, chain_hash
from vlp_plugins.calibration.checkpoint import Checkpoint, PassState
from vlp_plugins.calibration.large_sums import LargeSums
from vlp_plugins.calibration.measuring import Measuring
from vlp_plugins.runtime.distributed import batch_shard, rank_and_size
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.statistics.base import Key

logger = logging.getLogger("vlp_plugins.calibration")


class RunningPass:
    """What one process does with the batches.

    Attributes:
        state: after the batches so far.
        large: sums of loss statistics after the same batches.
        replayed: number of batches that an earlier, interrupted pass has seen.
    """

    def __init__(
        self,
        measuring: Measuring,
        device: torch.device,
        file: Checkpoint | None,
        every: int,
        done: tuple[PassState, Mapping[Key, torch.Tensor]],
    ) -> None:
        """Goes on from a state.

        Args:
            measuring: the probes.
            device: of the model.
            file: where the state is kept, if anywhere.
            every: batches between two writes.
            done: what an earlier pass has seen.
        """
        self._measuring = measuring
        self._file = file
        self._every = every
        self._rank, self._world = batch_shard(sharded=measuring.sharded)
        # Of a sharded model every process measures every batch; what the first finds counts.
        self._counts = not measuring.sharded or rank_and_size()[0] == 0
        self._done = done[0]
        self._digest = b""
        self.state = done[0]
        self.large = LargeSums(done[1], device)
        self.replayed = self._saved = self.state.batches

    def take(self, batch: Any, index: int) -> None:
        """Measures a batch, or passes over one that was seen already or is another process's.

        Raises:
            DataError: if it is not the batch that was seen.
        """
        self._digest = chain_hash(self._digest, batch)
        if index < self.replayed:
            self._check_replayed(index)
            self._measuring.advance(batch, index)
            return
        samples = batch_size(batch)
        if index % self._world != self._rank:
            self._measuring.advance(batch, index)
            self.state = self.state.after({}, samples, self._digest)
        elif (measured := self._measuring.measure(batch, index)) is None:
            if self._counts:
                self.state = self.state.without(samples, self._digest)
            else:
                self.state = self.state.after({}, samples, self._digest)
        else:
            with self.large.changing():
                self._measuring.add(measured, self.large if self._counts else None, self.state.half)
                found = measured.values if self._counts else {}
                self.state = self.state.after(found, samples, self._digest)
        if self._file is not None and self.state.batches % self._every == 0:
            self.save()

    def save(self) -> None:
        """Writes the state, if there is a file and the state is not in it.

        Raises:
            OutputError: if it cannot be written.
        """
        if self._file is not None and self.state.batches > self._saved:
            self._file.save(self.state, self.large.sums)
            self._saved = self.state.batches

    def save_interrupted(self) -> None:
        """`save`, unless the large sums were caught half changed."""
        if self.large.whole:
            self.save()
        if self._file is not None and self._saved > self.replayed:
            # What to do with it, the caller knows: the command tells, or deletes it.
            logger.info("stopped; %s holds the first %d batches", self._file.path, self._saved)

    def _check_replayed(self, index: int) -> None:
        if self._digest != self._done.hashes[index]:
            where = "" if self._file is None else f" {self._file.path}"
            raise DataError(
                f"batch {index} is not the one that checkpoint{where} has seen; give the same data "
                "in the same order (fix the loader's seed), or delete the checkpoint and start "
                "again"
            )
