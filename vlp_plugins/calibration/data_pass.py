"""The whole-model data pass: every batch once through the probes, statistics added up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.batches import (
    batch_size,
    chain_hash,
    check_batches,
    number_of_batches,
    warn_if_fewer,
)
from vlp_plugins.calibration.checkpoint import (
    FORM,
    PassState,
    identity_of,
    pack_state,
    unpack_state,
)
from vlp_plugins.calibration.moments import Key, LossStatistic, Statistic
from vlp_plugins.calibration.probes import Probes
from vlp_plugins.calibration.statistics import Statistics, check_sizes
from vlp_plugins.calibration.sums import LargeSums, Tally, sum_over_processes, sum_tally
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.checkpoint import Checkpoint, Content, Tensors
from vlp_plugins.runtime.distributed import batch_shard, broadcast, check_same, rank_and_size
from vlp_plugins.runtime.errors import DataError, NonFiniteError, OutputError, StatisticsError
from vlp_plugins.runtime.memory import usable_bytes
from vlp_plugins.runtime.offload import device_of

logger = logging.getLogger("vlp_plugins.calibration")


class RunningPass:
    """The batches that one process measures or passes over.

    Attributes:
        state: after the batches so far.
        large: sums of loss statistics after the same batches.
        replayed: number of batches that an earlier, interrupted pass has seen.
    """

    def __init__(
        self,
        probes: Probes,
        device: torch.device,
        file: Checkpoint | None,
        every: int,
        state: PassState,
        large: LargeSums,
    ) -> None:
        """Resumes from a state and its large sums; writes it to `file` every so many batches."""
        self._probes = probes
        self._device = device
        self._file = file
        self._every = every
        self._rank, self._world = batch_shard(sharded=probes.sharded)
        # Of a sharded model every process measures every batch; what rank 0 finds counts.
        self._counts = not probes.sharded or rank_and_size()[0] == 0
        self._replayed_hashes = state.hashes
        self._digest = b""
        self.state = state
        self.large = large
        self.replayed = self._saved = state.batches

    def take(self, batch: Any, index: int) -> None:
        """Measures a batch, or passes over one that was seen already or is another process's.

        Raises:
            DataError: if it is not the batch that was seen.
        """
        self._digest = chain_hash(self._digest, batch)
        if index < self.replayed:
            self._check_replayed(index)
            self._probes.advance(batch, index)
            return
        samples = batch_size(batch)
        if index % self._world != self._rank:
            self._probes.advance(batch, index)
            self.state = self.state.after({}, samples, self._digest)
        else:
            large = self.large if self._counts else None
            with self.large.changing():
                values = self._probes.measure(batch, index, large, self.state.half)
                if values is None and self._counts:
                    self.state = self.state.without(samples, self._digest)
                else:
                    counted = values if self._counts and values is not None else {}
                    self.state = self.state.after(counted, samples, self._digest)
        if self._file is not None and self.state.batches % self._every == 0:
            self.save()

    def save(self) -> None:
        """Writes the state, if there is a file and the state is not in it."""
        if self._file is not None and self.state.batches > self._saved:
            self._file.save(lambda: pack_state(self.state, self.large.sums))
            self._saved = self.state.batches

    def save_interrupted(self) -> None:
        """`save`, unless the large sums are half changed."""
        if self.large.whole:
            self.save()
        if self._file is not None and self._saved > self.replayed:
            logger.info("stopped; %s holds the first %d batches", self._file.path, self._saved)

    def statistics(self, weights: WeightMap, *, published: bool) -> Statistics:
        """The statistics of all processes after the last batch; empties the sums.

        Raises:
            NonFiniteError: if all batches were skipped.
            StatisticsError: if a weight was reached by no stream, or not by the loss.
        """
        state = self.state
        fingerprint = state.fingerprint.hex()[:16]
        check_same(fingerprint, f"{state.batches} batches")
        counted = state.read - sum_tally(state.skipped, self._device)
        if not sum(counted.batches):
            raise NonFiniteError(
                f"all {state.batches} batches were left out, because each had a NaN or infinite "
                "loss, gradient or activation; look at the checkpoint (weights after a diverged "
                "training), or run in float32"
            )
        self.large.sums.update(state.sums)
        sums = sum_over_processes(self.large.sums, self._device)
        self._probes.check_reached(sums)
        return Statistics(
            sums=sums,
            samples=counted.samples,
            batches=state.batches,
            fingerprint=fingerprint,
            structure=weights.structure,
            adapter=weights.adapter_name,
            published=published,
            shapes={name: weight.shape for name, weight in weights.items()},
            weights_hash=weights.content_hash(),
            counted=counted.batches,
        )

    def _check_replayed(self, index: int) -> None:
        if self._digest != self._replayed_hashes[index]:
            where = "" if self._file is None else f" {self._file.path}"
            raise DataError(
                f"batch {index} is not the one that checkpoint{where} has seen; give the same data "
                "in the same order (fix the loader's seed), or delete the checkpoint and start "
                "again"
            )


Progress = Callable[[int, int | None], None]


def calibrate(
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
    batches: Iterable[Batch],
    statistics: Sequence[Statistic],
    *,
    published: bool = False,
    autocast: torch.dtype | None = None,
    skip_nonfinite: bool = False,
    keep_state: bool = False,
    halves: bool = True,
    limit: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Gathers statistics in one pass over the data. The model is left as it was found.

    In a `torch.distributed` process group all processes must get the same batches in the same
    order; rank r runs those whose index is r modulo the world size, and all return the same
    statistics. A model under `fully_shard` runs every batch in all processes at once.

    Args:
        model: a model that `adapter` claims; batches are moved to the device of its parameters.
        adapter: of the model.
        weights: `WeightMap.of(model, adapter)`.
        batches: any iterable; read once, up to `limit`.
        statistics: what to gather.
        published: follow the published code where it departs from the idea.
        autocast: dtype in which losses run under `torch.autocast`; None runs as the model is.
        skip_nonfinite: leave out batches whose loss, gradients or activations are not finite; they
            count in no mean.
        keep_state: leave what the losses change (`Adapter.loss_state`) as the last batch left it,
            for a pass that continues from there; the caller restores it.
        halves: sum statistics of the loss, which are as large as the model, over the even and the
            odd batches apart: 16 bytes for each element, and 8 otherwise.
        limit: number of batches to use; None uses all.
        checkpoint: file for the state of the pass (one per process, `name.rank0of2`; a single one
            for a sharded model). It stays after the pass; the next one overwrites it.
        checkpoint_every: batches between two writes; an interruption or an error writes, too.
        resume: continue from the checkpoint, or from the first batch if there is none. The
            iterable must give the same batches again; those seen already are compared by hash. The
            result has the same bits as that of an uninterrupted pass.
        progress: called after every batch with (batches done, batches in all or None).

    Raises:
        DataError: if there are no batches, or not those that the checkpoint has seen.
        BatchError: if a batch lacks an input or does not fit the mask of its tokens.
        NonFiniteError: if a loss, gradient or activation is NaN or infinite, or if nothing but
            such batches is left.
        UnsupportedError: if two different statistics have one name, or if a statistic needs a
            loss and the adapter has none.
        StatisticsError: if the checkpoint is damaged or of another pass, or if a weight was
            reached by no stream, or not by the loss.
        OutputError: if the checkpoint cannot be written.
    """
    check_batches(batches, limit)
    if checkpoint_every < 1:
        raise DataError(f"checkpoint_every={checkpoint_every}; use 1 or more batches")
    probes = Probes(
        model,
        adapter,
        weights,
        statistics,
        published=published,
        autocast=autocast,
        skip_nonfinite=skip_nonfinite,
        keep_state=keep_state,
    )
    file = None
    if checkpoint is not None:
        identity = identity_of(
            weights, statistics, published=published, autocast=autocast, halves=halves
        )
        shard = batch_shard(sharded=probes.sharded)
        file = Checkpoint(checkpoint, FORM, identity, unit="batch", shard=shard)
    state, large = _resumed(file, resume, limit, statistics, weights)
    if probes.sharded:  # rank 0 keeps the sums and the file
        first = broadcast(replace(state, sums={}, skipped=Tally()))
        if rank_and_size()[0]:
            state, large, file = first, {}, None
    device = device_of(model)
    place = _place_of_sums(device, statistics, weights, halves=halves)
    sums = LargeSums(large, place, halves=halves)
    running = RunningPass(probes, device, file, checkpoint_every, state, sums)
    total = number_of_batches(batches, limit)
    with probes.attached():
        try:
            index = -1
            for index, batch in enumerate(islice(batches, limit)):
                running.take(batch, index)
                if progress is not None:
                    progress(index + 1, total)
        except OutputError:
            raise
        except BaseException:  # Ctrl-C above all, but a loader that fails is as good a reason
            running.save_interrupted()
            raise
    read = index + 1
    if read == 0:
        raise DataError("the calibration data is empty: no batch was read; check its path")
    if read < running.replayed:
        raise DataError(
            f"the checkpoint has seen {running.replayed} batches, but the data gave only {read}; "
            "give the same data, or delete the checkpoint and start again"
        )
    warn_if_fewer(read, limit)
    running.save()
    return running.statistics(weights, published=published)


def _place_of_sums(
    device: torch.device, statistics: Sequence[Statistic], weights: WeightMap, *, halves: bool
) -> torch.device:
    """The model's device if it has room for the sums of the gradients, twice, else the CPU."""
    if device.type != "cuda":
        return device
    sizes = sum(
        each.size(weight)
        for each in statistics
        if isinstance(each, LossStatistic)
        for weight in weights.values()
    )
    needed = (2 if halves else 1) * torch.float64.itemsize * sizes
    return device if 2 * needed <= usable_bytes(device, 0) else torch.device("cpu")


def _resumed(
    file: Checkpoint | None,
    resume: bool,
    limit: int | None,
    statistics: Sequence[Statistic],
    weights: WeightMap,
) -> tuple[PassState, dict[Key, torch.Tensor]]:
    if file is None:
        if resume:
            raise StatisticsError("resume needs the checkpoint file of the earlier pass; give it")
        return PassState(), {}
    if not resume:
        file.begin()
        return PassState(), {}

    def unpack(tensors: Tensors, content: Content) -> tuple[PassState, dict[Key, torch.Tensor]]:
        state, large = unpack_state(tensors, content)
        check_sizes({**state.sums, **large}, statistics, weights)
        return state, large

    state, large = file.load(unpack) or (PassState(), {})
    if limit is not None and state.batches > limit:
        raise StatisticsError(
            f"checkpoint {file.path} holds {state.batches} batches already, more than "
            f"limit={limit}; raise the limit, or delete it and run the pass from the start"
        )
    logger.info("resuming after %d batches", state.batches)
    return state, large
