"""What measuring intrinsic dimensions will take, said before any image is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlp_plugins.dimension.measure import default_settings
from vlp_plugins.dimension.plan import IdPlan, plan
from vlp_plugins.dimension.twonn import check_number
from vlp_plugins.jobs.inputs import Loaded, ModelSource
from vlp_plugins.jobs.plan import MadeUp
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.models.request import is_published
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.model_state import dtype_of

_PIXELS = 384
_SIDE = 1024
"""Of the matrices whose product is timed."""


@dataclass(frozen=True)
class PlannedDimensions:
    """What a run will take.

    Attributes:
        plan: bytes and passes.
        forward_seconds: of all passes, without reading images.
        neighbour_seconds: of the search for neighbours, as matrix products.
    """

    plan: IdPlan
    forward_seconds: float
    neighbour_seconds: float


def plan_dimensions(
    source: ModelSource, data: DataRecipe, options: Mapping[str, Any]
) -> PlannedDimensions:
    """Runs a made-up batch and calculates the rest; no image is read.

    Args:
        source: of the model.
        data: `batches` of it, or as many as there are; the index of the data is opened then.
        options: of `measure_id`.

    Raises:
        DataError: if nobody says how many samples there will be.
        StatisticsError: if they are too few.
        UnsupportedError: if a single layer does not fit into the budget.
    """
    loaded = Loaded.of(source, max_length=data.max_length)
    samples = _samples(loaded, data)
    made_up = MadeUp(loaded.adapter, loaded.processor, min(data.batch_size, samples), _PIXELS)
    batch = next(iter(made_up))
    published = is_published(options["variant"])
    estimator = options["estimator"] or default_settings(published=published)[0]
    check_number(samples, estimator, what="samples")
    dtype = dtype_of(options["dtype"])
    budget = options["memory_budget"]

    def planned() -> IdPlan:
        return plan(
            loaded.model,
            loaded.adapter,
            loaded.weights,
            batch,
            samples,
            padding=options["padding"] or ("published" if published else "real"),
            dtype=dtype,
            memory_budget=None if budget is None else bytes_of(budget),
            published=published,
        )

    found = planned()  # the first forward pass is slower than the others
    forward = seconds_of(planned)
    layers = [met for each in found.passes for met in each.layers]
    products = 2.0 * samples**2 * sum(met.ambient for met in layers)
    device = next(loaded.model.parameters()).device
    return PlannedDimensions(
        found,
        forward * found.batches * len(found.passes),
        products / _operations_per_second(device),
    )


def _samples(loaded: Loaded, data: DataRecipe) -> int:
    if data.source is not None:
        batches = loaded.batches(data)
        if batches.source.length is not None:
            return min(batches.source.length, len(batches) * data.batch_size)
    if data.batches is None:
        raise DataError(
            "how many samples will there be? Give --batches, or --data that knows its length"
        )
    return data.batches * data.batch_size


def _operations_per_second(device: torch.device) -> float:
    """Of products of float32 matrices."""
    matrix = torch.ones(_SIDE, _SIDE, device=device)

    def product() -> None:
        _ = float((matrix @ matrix)[0, 0])  # a GPU has done it when the number is there

    product()
    return 2.0 * _SIDE**3 / seconds_of(product)


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
