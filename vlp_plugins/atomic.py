"""Files and folders that appear whole or not at all.

They are written under a temporary name beside the target, synced to the disk and renamed. Whatever
goes wrong meanwhile, an exception or Ctrl-C, the temporary is removed and the target is untouched.
After `kill -9` a file named `.unfinished-*` may stay; the target is untouched then, too.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlp_plugins.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STORAGE = {*_FULL, errno.EROFS, errno.EIO}
# Libraries that write from C++ or Rust report the operating system's error as text only.
_FOREIGN_FAILURE = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter|unexpected pos \d+ vs")


@contextmanager
def atomic_file(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `target` when the block ends well.

    Folders that are missing above the target are made.

    Args:
        target: where the file shall be. A symbolic link is followed, not replaced.
        overwrite: replace an existing file; nothing else than a regular file is ever replaced.
        own: recognises the files that may be replaced, as of `check_own`; a link is not followed
            then. None replaces any, if `overwrite` says so.

    Raises:
        OutputError: if the target exists, or if it cannot be written (disk full, no permission).
    """
    if own is None:
        target = _real(target)
    else:
        overwrite, target = True, _real(Path(target).parent) / Path(target).name
        check_own(target, own)
    # The suffix stays, for libraries that choose a format by it; torch.save cannot do without one.
    suffix = target.suffix or ".tmp"
    temporary = target.with_name(f".unfinished-{secrets.token_hex(4)}{suffix}")
    with _cleaned_up(temporary, target):
        check_new(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        check_new(target, overwrite=overwrite)  # somebody may have made it meanwhile
        temporary.replace(target)
        _sync_folder(target.parent)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `target` when the block ends well.

    Raises:
        OutputError: if the target exists (an empty folder may), or if it cannot be written.
    """
    target = _real(target)
    temporary = target.with_name(f".unfinished-{secrets.token_hex(4)}")
    with _cleaned_up(temporary, target):
        check_new_folder(target)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        check_new_folder(target)
        if target.exists():
            target.rmdir()  # it is empty; only POSIX renames onto an empty folder
        temporary.rename(target)
        _sync_folder(target.parent)


def write_bytes(
    target: str | os.PathLike[str],
    data: bytes,
    *,
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> None:
    """Writes a whole file; see `atomic_file` for the arguments and what it raises."""
    with atomic_file(target, overwrite=overwrite, own=own) as temporary:
        temporary.write_bytes(data)


def write_text(
    target: str | os.PathLike[str],
    text: str,
    *,
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> None:
    """Writes a whole file in UTF-8, line ends as given; see `atomic_file`."""
    write_bytes(target, text.encode(), overwrite=overwrite, own=own)


def append_text(target: Path, text: str) -> None:
    """Appends to a file, and makes it if it is not there; on the disk when this returns.

    Raises:
        OutputError: if it is a link, which is not followed, or cannot be written.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(target, flags, 0o666), "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def check_own(target: Path, own: Callable[[Path], bool]) -> None:
    """Checks that a file which a run keeps its state in replaces nothing but such a file.

    Args:
        target: of the state.
        own: whether a regular file was written by an earlier run.

    Raises:
        OutputError: if something else is there, or a link, wherever it leads.
    """
    if target.is_symlink():
        raise OutputError(
            f"{target} is a link, and a run keeps its state there; no link is followed: remove "
            "it, or give another place"
        )
    if target.exists() and not (target.is_file() and own(target)):
        raise OutputError(
            f"{target} is where a run keeps its state, but no run wrote what is there; move it "
            "away, or give another place"
        )


def check_new(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Asks before the work whether `atomic_file` would accept a target.

    Raises:
        OutputError: if the target exists and is not to be, or cannot be, replaced.
    """
    target = Path(target)
    if not target.exists():
        return
    if not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise OutputError(f"{target} is {kind}; give the path of a file")
    if not overwrite:
        raise OutputError(f"{target} exists already; give another path or ask to overwrite it")


def check_new_folder(target: str | os.PathLike[str]) -> None:
    """Asks before the work whether `atomic_folder` would accept a target.

    Raises:
        OutputError: if the target is a file or a folder with something in it.
    """
    target = Path(target)
    if target.is_dir():
        if any(target.iterdir()):
            raise OutputError(f"folder {target} exists and is not empty; give another one")
    elif target.exists():
        raise OutputError(f"{target} is a file; give the path of a folder")


@contextmanager
def _cleaned_up(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if reason := _failure(error, temporary, target):
            raise OutputError(f"cannot write {target}: {reason}; nothing was written") from error
        raise


def _failure(error: BaseException, temporary: Path, target: Path) -> str | None:
    """Why the target could not be written; None if the error is about something else."""
    where = ""
    if isinstance(error, OSError):
        number = error.errno
        if not _concerns(error.filename, temporary, target) and number not in _STORAGE:
            return None
        if error.filename and Path(error.filename) in target.parents:
            where = f" ({error.filename})"
    elif found := _FOREIGN_FAILURE.search(str(error)):
        # torch does not say why; a full disk is the common reason.
        number = int(found[1]) if found[1] else errno.ENOSPC
        if number not in _STORAGE:
            return None
    else:
        return None
    if number in _FULL:
        return "no space left on the disk (or a quota is used up); free some or write elsewhere"
    return f"{os.strerror(number) if number else error}{where}"


def _concerns(filename: object, temporary: Path, target: Path) -> bool:
    """True if an error's file is the temporary, in it, the target or a folder above."""
    if not isinstance(filename, str | os.PathLike):
        return False
    path = Path(filename)
    return path == target or path in target.parents or path.is_relative_to(temporary)


def _real(target: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(target))


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets one open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
