"""The plan of a composition: its one pass over the data is done with made-up batches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.job.facts import bytes_of_statistics
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.methods.composition import composed
from vlp_plugins.models.adapter import Batch
from vlp_plugins.plan.counting import bytes_of_masks, known_counts
from vlp_plugins.plan.memory import bytes_of_model, device_of, peak_with_writing
from vlp_plugins.plan.value import Plan
from vlp_plugins.report.page import check_can_render
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import peak_device_bytes, peak_resident_bytes
from vlp_plugins.runtime.model_state import autocast_of


def plan_composition(job: Prepared, batches: Iterable[Batch] | None) -> Plan:
    """Gathers statistics of made-up batches and makes masks of them, as the run will.

    Args:
        job: what shall be run.
        batches: made-up ones; None for a method without data.
    """
    needs = composed(job.method).needs
    statistics = None
    seconds = None
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    if needs and batches is not None:
        ends = [time.perf_counter()]
        statistics = calibrate(
            job.model,
            job.adapter,
            job.weights,
            batches,
            needs,
            published=job.published,
            autocast=autocast_of(job.recipe.autocast),
            progress=lambda *_: ends.append(time.perf_counter()),
        )
        seconds = min(later - earlier for earlier, later in pairwise(ends))
    masks = job.masks(statistics)
    peak = peak_resident_bytes()
    if statistics is not None:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]  # the run compares them
        peak = peak_resident_bytes()
        del halves
    sizes = bytes_of_masks(job)
    return Plan(
        weights=job.weights,
        counts=known_counts(job.method, masks),
        passes=1 if needs else 0,
        peak_bytes=peak_with_writing(job, peak, max(sizes)),
        device_peak_bytes=peak_device_bytes(device_of(job)),
        model_bytes=bytes_of_model(job),
        statistics_bytes=0 if statistics is None else bytes_of_statistics(statistics),
        masks_bytes=sum(sizes),
        seconds_per_batch=seconds,
    )
