"""How many batches there will be, by the index of the data."""

from __future__ import annotations

from dataclasses import replace

from vlp_plugins.job.prepared import Prepared


def with_length(job: Prepared) -> Prepared:
    """The job with the number of its batches in the recipe, where the index of its data tells it.

    No image is read. A composition reads its data once, so what it costs is told per batch.

    Raises:
        DataError: if the data that is named is not there.
    """
    data = job.recipe.data
    if job.is_composition or data.source is None or data.batches is not None:
        return job
    batches = job.batches()
    if batches.source.length is None:
        return job
    counted = replace(data, batches=len(batches))
    return replace(job, recipe=replace(job.recipe, data=counted))
