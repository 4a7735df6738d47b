"""A method that runs the model as it goes, in the folder of work beside the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.job.workplace import working
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Procedure
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import no_exit


def run_procedure(
    job: Prepared,
    method: Procedure,
    batches: Iterable[Batch] | None,
    out: Path,
    *,
    progress: Callable[[int, int | None], None] | None,
    resume: bool,
    keep: bool = False,
) -> list[Masks]:
    """Masks for every target.

    Args:
        job: what is run.
        method: its method.
        batches: None for a method that reads none.
        out: the folder of results.
        progress: called with (batches done, batches in all or None).
        resume: go on from what an interrupted run left in the folder of work.
        keep: leave what is in the folder, which this run has used already.

    Raises:
        OutputError: if there is no place to work.
        VlpError: whatever the method says.
    """
    with working(out, resume=resume or keep) as work:
        context = job.context(
            () if batches is None else batches, workplace=work, resume=resume, progress=progress
        )
        with no_exit(f"method {method.name!r}"):
            return method.run(context)


def measure_profile(
    job: Prepared,
    method: IdGuided,
    batches: Iterable[Batch],
    out: Path,
    *,
    progress: Callable[[int, int | None], None] | None,
    resume: bool,
) -> IdProfile:
    """The intrinsic dimensions that a method needs; the folder of work keeps what is known.

    Args:
        job: what is run.
        method: its method.
        batches: of the calibration data.
        out: the folder of results.
        progress: called with (batches done, batches in all or None).
        resume: go on from what an interrupted run left in the folder of work.

    Raises:
        OutputError: if there is no place to work.
        VlpError: see `IdGuided.measured`.
    """
    with working(out, resume=resume) as work:
        context = job.context(batches, workplace=work, resume=resume, progress=progress)
        return method.measured(context)
