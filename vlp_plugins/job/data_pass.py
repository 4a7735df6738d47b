"""The data pass of a run, and the checkpoint that it may leave behind."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.statistics import Statistics, is_statistics_file
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.methods.composition import composed
from vlp_plugins.runtime.errors import DataError, VlpError
from vlp_plugins.runtime.model_state import autocast_of

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


def statistics_of(
    job: Prepared,
    known: Statistics | None,
    batches: CaptionedBatches | None,
    out: Path,
    *,
    progress: Progress | None,
    resume: bool,
) -> Statistics | None:
    """What a composition reads, from an earlier pass or from data; None if it reads nothing.

    Args:
        job: what is run.
        known: of an earlier pass.
        batches: None if there are known statistics.
        out: the folder of results, beside which the checkpoint lies.
        progress: called with (batches done, batches in all or None).
        resume: continue from the checkpoint.

    Raises:
        VlpError: see `calibrate`; or if the known statistics are of another model.
    """
    needs = composed(job.method).needs
    if not needs:
        return None
    if batches is None:
        assert known is not None
        known.check(job.weights, published=job.published)
        return known
    with _checkpoints_kept_if_useful(out, batches, resumed=resume):
        return calibrate(
            job.model,
            job.adapter,
            job.weights,
            batches,
            needs,
            published=job.published,
            autocast=autocast_of(job.recipe.autocast),
            skip_nonfinite=job.recipe.skip_nonfinite,
            checkpoint=checkpoint_of(out),
            checkpoint_every=job.recipe.checkpoint_every,
            resume=resume,
            progress=progress,
        )


def checkpoint_of(out: Path) -> Path:
    """Where the data pass of a run keeps its state; each of several processes adds its mark."""
    return out.with_name(f"{out.name}.checkpoint")


def checkpoints(out: Path) -> list[Path]:
    """The files that are there, of one process or of several; none that is someone else's."""
    base = checkpoint_of(out)
    pattern = re.compile(re.escape(base.name) + r"(\.rank\d+of\d+)?")
    if not base.parent.is_dir():
        return []
    named = (path for path in base.parent.iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in named if is_statistics_file(path, "checkpoint"))


def delete_checkpoints(out: Path) -> None:
    """Deletes those files."""
    for path in checkpoints(out):
        path.unlink(missing_ok=True)


@contextmanager
def _checkpoints_kept_if_useful(
    out: Path, batches: CaptionedBatches, *, resumed: bool
) -> Iterator[None]:
    """Leaves no checkpoint of a pass that was rejected and would be rejected again (NaN).

    That of data that broke off stays, and so does that of an earlier run.
    """
    try:
        yield
    except Exception as error:
        if not resumed:
            if not _can_go_on(error, batches):
                delete_checkpoints(out)
            elif found := checkpoints(out):
                _log.warning("%s keeps what was read; --resume goes on from there", found[0])
        raise


def _can_go_on(error: Exception, batches: CaptionedBatches) -> bool:
    if not isinstance(error, DataError):
        return not isinstance(error, VlpError)
    try:
        batches.source.check()
    except DataError:  # too many images do not decode; without them the batches are others
        return False
    return True
