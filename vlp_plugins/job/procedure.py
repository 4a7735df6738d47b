"""A method that runs the model as it goes, and the folder that it works in.

`OUT.work` lies beside the folder of results: checkpoints between stages, gradients on the disk.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlp_plugins.adapter import Batch
from vlp_plugins.artifacts import made_by
from vlp_plugins.calibration.processes import place
from vlp_plugins.errors import OutputError
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.launch import wait_for_all
from vlp_plugins.masks import Masks
from vlp_plugins.methods.base import Procedure

_log = logging.getLogger(__name__)
_MARK = "vlp-prune-works-here.txt"
"""Tells a folder of ours, which may be deleted, from one that happens to have the name."""


def run_procedure(
    job: Prepared,
    method: Procedure,
    batches: Iterable[Batch] | None,
    out: Path,
    *,
    progress: Callable[[int, int | None], None] | None,
    resume: bool,
) -> list[Masks]:
    """Masks for every target.

    Args:
        job: what is run.
        method: its method.
        batches: None for a method that reads none.
        out: the folder of results.
        progress: called with (batches done, batches in all or None).
        resume: go on from what an interrupted run left in the folder of work.

    Raises:
        OutputError: if there is no place to work.
        VlpError: whatever the method says.
    """
    with _working(out, resume=resume) as work:
        context = job.context(
            () if batches is None else batches, workplace=work, resume=resume, progress=progress
        )
        return method.run(context)


def work_of(out: Path) -> Path:
    """Where the method of a run works."""
    return out.with_name(f"{out.name}.work")


def work_left(out: Path) -> list[Path]:
    """What an interrupted run left there to go on from."""
    work = work_of(out)
    if not (work / _MARK).is_file():
        return []
    return sorted(path for path in work.rglob("*") if path.is_file() and path.name != _MARK)


def delete_work(out: Path) -> None:
    """Deletes the folder of work, if it is one."""
    work = work_of(out)
    if (work / _MARK).is_file():
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _working(out: Path, *, resume: bool) -> Iterator[Path]:
    """The folder, made by process 0; it stays after an error if somebody can go on from there."""
    work = work_of(out)
    first = place()[0] == 0
    if first:
        _check_ours(work)
        if not resume:
            delete_work(out)
        _make(work)
    wait_for_all()
    try:
        yield work
    except BaseException as error:
        if first and not work_left(out):
            delete_work(out)
        elif first and isinstance(error, Exception):
            _log.warning("%s keeps what was done; --resume goes on from there", work)
        raise


def _check_ours(work: Path) -> None:
    if not work.exists() or (work / _MARK).is_file():
        return
    if not work.is_dir() or any(work.iterdir()):
        raise OutputError(
            f"{work} is where the method would work, but it is somebody else's; move it away, or "
            "give another --out"
        )


def _make(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / _MARK).write_text(
            f"Written by {made_by()}: checkpoints and gradients of a run of `vlp prune`. The "
            "folder is deleted when the run ends well; `vlp prune ... --resume` goes on from it.\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise OutputError(f"cannot make {work}: {error.strerror or error}") from error
