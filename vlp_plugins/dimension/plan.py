"""What measuring dimensions will take, said from one batch before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlp_plugins.calibration.batches import batch_size, to_device
from vlp_plugins.calibration.outputs import Output, OutputProbe, Padding
from vlp_plugins.dimension.measure import check_measured
from vlp_plugins.dimension.points import LayerUse, Need, Room, Sites, expected, pack
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import all_reduce_min, batch_shard
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import text_of, usable_bytes
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.runtime.sharding import at_rest, is_sharded


@dataclass(frozen=True)
class PlannedPass:
    """One pass over the batches: layers in the order of execution, streams that run, and bytes.

    Points are held until their layers' dimensions are computed; the search for neighbours takes
    `work_bytes` in addition.
    """

    layers: tuple[LayerUse, ...]
    streams: tuple[str, ...]
    held_bytes: int
    work_bytes: int

    @property
    def peak_bytes(self) -> int:
        """At the worst moment, in addition to the model and its forward pass."""
        return self.held_bytes + self.work_bytes


@dataclass(frozen=True)
class IdPlan:
    """What one process will do, and `lines` that say it. Bytes are its own; samples are of all."""

    samples: int
    batches: int
    passes: tuple[PlannedPass, ...]
    lines: tuple[str, ...]


def plan(
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
    batch: Batch,
    samples: int,
    *,
    padding: Padding = "real",
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    published: bool = False,
) -> IdPlan:
    """Runs one batch and calculates the rest; nothing is kept of the outputs.

    Texts that are longer than those of the batch take more than is said here: the work adapts.

    Arguments are those of `measure`; `batch` is one like those to come, `samples` how many samples
    there will be.

    Raises:
        UnsupportedError: if a single layer does not fit into the budget.
        DataError: if there are no samples.
    """
    if samples < 1:
        raise DataError(f"{samples} samples; there must be at least one")
    at_rest(model)
    device = device_of(model)
    sites = Sites()

    def note(output: Output) -> None:
        sites.see(output, (dtype or output.tokens.dtype).itemsize)

    probe = OutputProbe(model, adapter, weights, padding=padding, published=published)
    with probe.attached():
        probe.run(to_device(batch, device), note)
    check_measured(adapter, weights, sites)
    budget = all_reduce_min(usable_bytes(device, 0)) if memory_budget is None else memory_budget
    processes = batch_shard(sharded=is_sharded(model.parameters()))[1]
    size = batch_size(batch)
    batches = -(-samples // size)
    rows = min(samples, expected((), batches, size, processes)[0])
    room = Room(budget, rows, samples, processes > 1, dtype)
    layers = list(sites.values())
    needs = [room.need(use) for use in layers]
    passes = tuple(
        _pass(sites, layers[start:stop], needs[start:stop]) for start, stop in pack(needs, budget)
    )
    lines = _lines(passes, samples, batches, budget, processes)
    return IdPlan(samples, batches, passes, lines)


def _pass(sites: Sites, layers: Sequence[LayerUse], needs: Sequence[Need]) -> PlannedPass:
    streams = sites.streams()
    last = max(streams.index(use.site.stream) for use in layers)
    return PlannedPass(
        tuple(layers),
        tuple(streams[: last + 1]),
        sum(need.held for need in needs),
        max(need.work for need in needs),
    )


def _lines(
    passes: Sequence[PlannedPass], samples: int, batches: int, budget: int, processes: int
) -> tuple[str, ...]:
    count = sum(len(each.layers) for each in passes)
    points = text_of(sum(each.held_bytes for each in passes))
    per = " per process" if processes > 1 else ""
    often = "1 pass" if len(passes) == 1 else f"{len(passes)} passes"
    first = (
        f"points of {count} layers for {samples} samples: {points}{per}; {often} over {batches} "
        f"batches within {text_of(budget)}{per}"
    )
    return (
        first,
        *(
            f"pass {number}: {_range(each.layers)}, {text_of(each.peak_bytes)}; runs "
            f"{', '.join(each.streams)}"
            for number, each in enumerate(passes, start=1)
        ),
    )


def _range(layers: Sequence[LayerUse]) -> str:
    if len(layers) == 1:
        return layers[0].module
    return f"{len(layers)} layers from {layers[0].module} to {layers[-1].module}"
