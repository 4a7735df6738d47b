"""The data pass: every batch once through the adapter's streams, statistics added up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.calibration.batches import batch_size, chain_hash, to_device
from vlp_plugins.calibration.checkpoint import Checkpoint, PassState, identity_of
from vlp_plugins.calibration.probe import ActivationProbe
from vlp_plugins.calibration.processes import check_same, place, sum_over_processes
from vlp_plugins.errors import DataError, OutputError, StatisticsError
from vlp_plugins.statistics.base import ActivationStatistic
from vlp_plugins.statistics.store import Statistics
from vlp_plugins.weights import WeightMap

logger = logging.getLogger("vlp_plugins.calibration")

Progress = Callable[[int, int | None], None]


def calibrate(
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
    batches: Iterable[Batch],
    statistics: Sequence[ActivationStatistic],
    *,
    published: bool = False,
    limit: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Gathers statistics in one pass over the data. The model is left as it was found.

    In a `torch.distributed` process group every process must be given the same batches in the same
    order; process r runs those whose index is r modulo the number of processes, and all return
    the same statistics.

    Args:
        model: a model that `adapter` claims; batches are moved to the device of its parameters.
        adapter: what it is described by.
        weights: `WeightMap.of(model, adapter)`.
        batches: any iterable; read once, up to `limit`.
        statistics: what to gather.
        published: follow the published code where it departs from the idea.
        limit: number of batches to use; None uses all.
        checkpoint: file that keeps the state of the pass (one per process, `name.rank0of2`). It
            stays after the pass and is overwritten by the next; delete it when you like.
        checkpoint_every: batches between two writes; an interruption or an error writes, too.
        resume: continue from the checkpoint: the iterable must give the same batches again, those
            seen already are compared by hash only. The result has the same bits as that of an
            uninterrupted pass. Without a file the pass starts from the first batch.
        progress: called after every batch with (batches done, batches in all or None).

    Raises:
        DataError: if there are no batches, or not those that the checkpoint has seen.
        BatchError: if a batch lacks an input or does not fit the mask of its tokens.
        NonFiniteError: if an activation is NaN or infinite.
        UnsupportedError: if two different statistics have one name.
        StatisticsError: if the checkpoint is damaged or of another pass, or if no stream ran a
            weight.
        OutputError: if the checkpoint cannot be written.
    """
    if isinstance(batches, Mapping):
        raise DataError("that is a single batch; give a list of batches, or a loader")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no batch; use 1 or more, or None for all")
    if checkpoint_every < 1:
        raise DataError(f"checkpoint_every={checkpoint_every}; use 1 or more batches")
    rank, world = place()
    file = None
    if checkpoint is not None:
        identity = identity_of(weights, statistics, published=published)
        file = Checkpoint(checkpoint, identity, rank, world)
    done = _resumed(file, resume, limit)
    state, saved = done, done.batches
    device = next(model.parameters()).device
    total = _total(batches, limit)
    probe = ActivationProbe(model, adapter, weights, statistics, published=published)
    with probe.attached():
        try:
            digest = b""
            index = -1
            for index, batch in enumerate(islice(batches, limit)):
                digest = chain_hash(digest, batch)
                if index < done.batches:
                    _check_replayed(done, index, digest, file)
                else:
                    mine = index % world == rank
                    values = probe.measure(to_device(batch, device), index) if mine else {}
                    state = state.after(values, batch_size(batch), digest)
                    if file is not None and state.batches % checkpoint_every == 0:
                        file.save(state)
                        saved = state.batches
                if progress is not None:
                    progress(index + 1, total)
        except OutputError:
            raise
        except BaseException:  # Ctrl-C above all, but a loader that fails is as good a reason
            if file is not None and state.batches > saved:
                file.save(state)
                # What to do with it, the caller knows: the command tells, or deletes it.
                logger.info("stopped; %s holds the first %d batches", file.path, state.batches)
            raise
    _check_read(index + 1, done.batches, limit)
    if file is not None and state.batches > saved:
        file.save(state)
    return _finish(state, model, weights, statistics, published)


def _resumed(file: Checkpoint | None, resume: bool, limit: int | None) -> PassState:
    if file is None:
        if resume:
            raise StatisticsError("resume needs the checkpoint file of the earlier pass; give it")
        return PassState()
    if not resume:
        if file.path.exists():
            logger.warning("%s is not resumed and will be overwritten", file.path)
        return PassState()
    state = file.load()
    if limit is not None and state.batches > limit:
        raise StatisticsError(
            f"checkpoint {file.path} holds {state.batches} batches already, more than "
            f"limit={limit}; raise the limit, or delete it and run the pass from the start"
        )
    logger.info("resuming after %d batches", state.batches)
    return state


def _check_replayed(done: PassState, index: int, digest: bytes, file: Checkpoint | None) -> None:
    if digest != done.hashes[index]:
        where = "" if file is None else f" {file.path}"
        raise DataError(
            f"batch {index} is not the one that checkpoint{where} has seen; give the same data in "
            "the same order (fix the loader's seed), or delete the checkpoint and start again"
        )


def _check_read(read: int, replayed: int, limit: int | None) -> None:
    if read == 0:
        raise DataError("the calibration data is empty: no batch was read; check its path")
    if read < replayed:
        raise DataError(
            f"the checkpoint has seen {replayed} batches, but the data gave only {read}; give "
            "the same data, or delete the checkpoint and start again"
        )
    if limit is not None and read < limit:
        logger.warning("the data gave %d batches, fewer than limit=%d; used them all", read, limit)


def _finish(
    state: PassState,
    model: nn.Module,
    weights: WeightMap,
    statistics: Sequence[ActivationStatistic],
    published: bool,
) -> Statistics:
    fingerprint = state.fingerprint.hex()[:16]
    check_same(fingerprint, f"{state.batches} batches")
    sums = sum_over_processes(state.sums, next(model.parameters()).device)
    reached = {site.weight for _, site in sums}
    missed = [name for name in weights if name not in reached]
    if statistics and missed:
        raise StatisticsError(
            f"no stream of adapter {weights.adapter_name!r} ran weight {missed[0]!r} at "
            f"{', '.join(owner.module for owner in weights[missed[0]].owners)} ({len(missed)} "
            "weights in all); the adapter must run it or exclude it (with ModuleAdapter: "
            "exclude=..., or batches that use the whole model)"
        )
    return Statistics(
        sums=sums,
        samples=state.samples,
        batches=state.batches,
        fingerprint=fingerprint,
        structure=weights.structure,
        adapter=weights.adapter_name,
        published=published,
        shapes={name: weight.shape for name, weight in weights.items()},
        weights_hash=weights.content_hash(),
    )


def _total(batches: Iterable[Batch], limit: int | None) -> int | None:
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader over an iterable data set
        return limit
    return length if limit is None else min(length, limit)
