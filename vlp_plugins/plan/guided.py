"""The plan of a method that looks at intrinsic dimensions first."""

from __future__ import annotations

import time
from dataclasses import replace

from vlp_plugins.dimension.measure import default_settings
from vlp_plugins.dimension.plan import plan
from vlp_plugins.dimension.twonn import check_number
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.plan.made_up import MadeUp
from vlp_plugins.plan.value import Measuring, Plan
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import bytes_of, resident_bytes
from vlp_plugins.scoring.allocation import ModalityAllocation


def plan_guided(job: Prepared, method: IdGuided, batches: MadeUp, inner: Plan) -> Plan:
    """Adds what it takes to measure, by one made-up batch, to the plan of the method guided.

    Args:
        job: what shall be run.
        method: its method.
        batches: made-up ones.
        inner: plan of the method without dimensions.

    Raises:
        DataError: if nobody can say how many batches there will be.
        StatisticsError: if there will be too few samples.
        UnsupportedError: if a layer does not fit into the memory budget.
    """
    count = job.recipe.data.batches
    if count is None:
        raise DataError(
            f"nobody can say how many batches there will be, so nobody can say what measuring "
            f"dimensions for {method.name!r} takes; give their number with --batches"
        )
    budget = job.recipe.memory_budget
    estimator, padding = default_settings(published=job.published)
    check_number(count * batches.size, estimator, what="samples")
    batch = next(iter(batches))
    start = time.perf_counter()
    measuring = plan(
        job.model,
        job.adapter,
        job.weights,
        batch,
        count * batches.size,
        padding=padding,
        memory_budget=None if budget is None else bytes_of(budget),
        published=job.published,
    )
    seconds = time.perf_counter() - start
    peak = resident_bytes() + max(each.peak_bytes for each in measuring.passes)
    counts = inner.counts
    if not isinstance(method.method.allocation, ModalityAllocation):
        counts = [{"all": each["all"]} for each in counts]  # dimensions share out the rest
    return replace(
        inner,
        counts=counts,
        passes=inner.passes + len(measuring.passes),
        peak_bytes=max(inner.peak_bytes, peak),
        measuring=Measuring(measuring, seconds),
    )
