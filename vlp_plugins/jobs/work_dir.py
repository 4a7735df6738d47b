"""The folder `OUT.work` next to a folder of results: what a run keeps until it ends well.

Checkpoints between the stages of a method, gradients on the disk, passes and points that are done.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlp_plugins.runtime.artifacts import made_by
from vlp_plugins.runtime.distributed import rank_and_size, wait_for_all
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import check_new_folder, remove_abandoned, reserved

_log = logging.getLogger(__name__)
_MARK = "vlp-prune-works-here.txt"
"""Tells a folder of ours, which may be deleted, from one that happens to have the name."""
_WRITTEN_BY = "Written by vlp_plugins"


def work_of(out: Path) -> Path:
    """Where a run works."""
    return out.with_name(f"{out.name}.work")


def work_left(out: Path) -> list[Path]:
    """What an interrupted run left there to resume from."""
    work = work_of(out)
    if not _is_ours(work):
        return []
    return sorted(path for path in work.rglob("*") if path.is_file() and path.name != _MARK)


def delete_work(out: Path) -> None:
    """Deletes the folder of work, if it is one."""
    work = work_of(out)
    if _is_ours(work):
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def claimed(
    out: Path, *, writes: bool, mark: str | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Makes sure that a folder of results is free, and keeps other runs from it and its work.

    After a run that ends well all processes wait for each other, and its work is deleted. `writes`
    says whether this process is the one of several that writes; for `mark` and `overwrite` see
    `atomic_folder`.

    Yields:
        Its absolute path.

    Raises:
        OutputError: if it is taken, or another run is at work for it.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  resolve() would follow links
    if not writes:
        yield out
        wait_for_all()
        return
    check_new_folder(out, mark=mark, overwrite=overwrite)
    with reserved(out):
        # Another run may have ended meanwhile.
        check_new_folder(out, mark=mark, overwrite=overwrite)
        remove_abandoned(work_of(out))
        yield out
        wait_for_all()
        delete_work(out)


@contextmanager
def working(out: Path, *, resume: bool) -> Iterator[Path]:
    """The folder, made by process 0; it stays after an error if a run can resume from it."""
    work = work_of(out)
    first = rank_and_size()[0] == 0
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
            _log.warning("%s keeps what was done; --resume continues from there", work)
        raise


def _is_ours(work: Path) -> bool:
    """True for a folder that a run made; links to such folders, or with such a mark, are none."""
    mark = work / _MARK
    if work.is_symlink() or mark.is_symlink() or not mark.is_file():
        return False
    return mark.read_text(encoding="utf-8", errors="replace").startswith(_WRITTEN_BY)


def _check_ours(work: Path) -> None:
    links = [work] if work.is_symlink() else [p for p in work.rglob("*") if p.is_symlink()]
    if links:
        raise OutputError(
            f"{links[0]} is a link, and a run works there; no link is followed: remove it, or "
            "give another --out"
        )
    if not work.exists() or _is_ours(work):
        return
    if not work.is_dir() or any(work.iterdir()):
        raise OutputError(
            f"{work} is where the run would work, but it is not one of a run; move it away, or "
            "give another --out"
        )


def _make(work: Path) -> None:
    version = made_by().removeprefix("vlp_plugins")
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / _MARK).write_text(
            f"{_WRITTEN_BY}{version}: what a run of `vlp` that has not ended keeps. The folder is "
            "deleted when the run ends well; the same command with --resume continues from it.\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise OutputError(f"cannot make {work}: {error.strerror or error}") from error
