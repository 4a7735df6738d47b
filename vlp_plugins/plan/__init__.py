"""What a run will do and cost, said before any data is read."""

from __future__ import annotations

from dataclasses import replace

from vlp_plugins.data.processors import Processor
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Procedure
from vlp_plugins.plan.compositions import plan_composition
from vlp_plugins.plan.guided import plan_guided
from vlp_plugins.plan.length import with_length
from vlp_plugins.plan.made_up import MadeUp
from vlp_plugins.plan.procedures import plan_procedure
from vlp_plugins.plan.value import Plan

__all__ = ["Plan", "plan_run"]


def plan_run(
    job: Prepared,
    *,
    processor: Processor | None = None,
    batch_size: int = 32,
    image_size: int = 384,
) -> Plan:
    """Finds out what a run costs with two made-up batches, and writes nothing.

    No image is read. The batches have blank images and captions of usual length. The peak is that
    of this process, so it is meant for a fresh one that loads the model and plans, as `vlp plan`
    does; how an allocator fragments its memory cannot be calculated, only repeated.

    Args:
        job: what shall be run.
        processor: makes batches; needed by methods that read data.
        batch_size: of the run.
        image_size: side of the made-up images in pixels; the processor resizes them.

    Raises:
        ValueError: if the method reads data and there is no processor.
        DataError: if the method has to know how many batches there will be, and nobody says so.
    """
    if job.method.reads_data and processor is None:
        raise ValueError(f"method {job.method.name!r} reads data: a processor is needed")
    batches = None if processor is None else MadeUp(job.adapter, processor, batch_size, image_size)
    return _plan(with_length(job), batches)


def _plan(job: Prepared, batches: MadeUp | None) -> Plan:
    if isinstance(job.method, IdGuided) and batches is not None:
        inner = replace(job, method=job.method.method.with_allocation(job.method.allocation))
        return plan_guided(job, job.method, batches, _plan(inner, batches))
    if isinstance(job.method, Procedure):
        return plan_procedure(job, job.method, batches)
    return plan_composition(job, batches)
