"""The plan of a procedure: what it says about itself, and one timed batch; it is not run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.methods.method import Procedure
from vlp_plugins.models.adapter import Batch
from vlp_plugins.plan.counting import bytes_of_masks, counting_masks, known_counts
from vlp_plugins.plan.memory import bytes_of_model, device_of, peak_with_writing
from vlp_plugins.plan.value import Plan
from vlp_plugins.report.page import check_can_render
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import peak_device_bytes, peak_resident_bytes
from vlp_plugins.runtime.model_state import autocast_of


def plan_procedure(job: Prepared, method: Procedure, batches: Iterable[Batch] | None) -> Plan:
    """Asks the method for its cost and times the forward and backward pass of a batch.

    Args:
        job: what shall be run.
        method: its method.
        batches: made-up ones; None for a method without data.

    Raises:
        VlpError: if the method cannot do what is asked, as far as it knows before it runs.
    """
    cost = method.cost(job.context(workplace=_existing(Path(job.recipe.out or "."))))
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    seconds = None
    if batches is not None and cost.gradient_batches:
        seconds = seconds_per_gradient(job, batches)
    peak = peak_resident_bytes() + cost.ram_bytes
    sizes = bytes_of_masks(job)
    return Plan(
        weights=job.weights,
        counts=known_counts(method, counting_masks(job)),
        passes=cost.passes if method.reads_data else 0,
        peak_bytes=peak_with_writing(job, peak, max(sizes)),
        device_peak_bytes=peak_device_bytes(device_of(job)),
        model_bytes=bytes_of_model(job),
        statistics_bytes=0,
        masks_bytes=sum(sizes),
        seconds_per_batch=seconds,
        cost=cost,
    )


def _existing(out: Path) -> Path:
    """The folder nearest to the results that is there already: it has the disk of the run."""
    return next(folder for folder in out.absolute().parents if folder.is_dir())


def seconds_per_gradient(job: Prepared, batches: Iterable[Batch]) -> float:
    """Seconds of the forward and backward pass of a batch, the fastest of those given."""
    probe = LossProbe(
        job.model,
        job.adapter,
        job.weights,
        published=job.published,
        autocast=autocast_of(job.recipe.autocast),
        skip_nonfinite=True,  # blank images may be too much for an untrained model
    )
    times = []
    with probe.attached():
        for index, batch in enumerate(batches):
            start = time.perf_counter()
            probe.measure(batch, index)
            times.append(time.perf_counter() - start)
    return min(times)
