"""What files of unknown origin may take of the memory and name of other files."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.memory import bytes_of, text_of

LIMIT_VARIABLE = "VLP_READ_LIMIT"
OUTSIDE_VARIABLE = "VLP_READ_OUTSIDE"
_LIMIT = "256MiB"


def read_limit() -> int:
    """Bytes that one thing which a file describes may take beyond the bytes that the file has.

    A picture, a member of an archive, a recipe, tensors, a model: a few kilobytes can describe
    more than any memory holds. The environment variable `VLP_READ_LIMIT` sets it, as in `4GiB`;
    without it, it is 256 MiB.

    Raises:
        UnsupportedError: if the variable is no amount of memory.
    """
    try:
        return bytes_of(os.environ.get(LIMIT_VARIABLE) or _LIMIT)
    except UnsupportedError as error:
        raise UnsupportedError(f"{LIMIT_VARIABLE}: {error}") from error


def check_read(what: str, size: int, error: type[Exception], *, stored: int = 0) -> None:
    """Checks, before memory is taken, that what a file describes is within `read_limit`.

    Args:
        what: to be read, for the message.
        size: bytes that it will take.
        error: what is raised.
        stored: bytes that the file has for it.

    Raises:
        Exception: of type `error`, if it takes more.
    """
    if size > stored + read_limit():
        raise error(
            f"{what} would take {text_of(size)} of memory, which is over the limit of "
            f"{text_of(stored + read_limit())}; if you trust the file, raise it, as in "
            f"{LIMIT_VARIABLE}={-(-size // 2**20)}MiB"
        )


def check_inside(
    path: str | os.PathLike[str],
    folders: Path | Sequence[Path],
    source: object,
    error: type[Exception] = DataError,
) -> None:
    """Checks that a path which a file names lies in a folder; links in the folder may lead out.

    `VLP_READ_OUTSIDE=1` (or `true`, `yes`) in the environment allows any path.

    Args:
        path: absolute, or relative to the working directory as the folders are.
        folders: that it may lie in, one or several.
        source: the file that names the path, for messages.
        error: what is raised.

    Raises:
        Exception: of type `error`, if it lies elsewhere.
        UnsupportedError: if the variable says neither yes nor no.
    """
    if _outside_allowed():
        return
    # Without resolving links: a link that the user put into the folder is the user's choice.
    places = [folders] if isinstance(folders, Path) else folders
    lies = Path(os.path.abspath(path))  # noqa: PTH100
    if not any(lies.is_relative_to(os.path.abspath(place)) for place in places):  # noqa: PTH100
        raise error(
            f"{source} names {os.fspath(path):.300}, which is outside of "
            f"{' and '.join(map(str, places))}; link its folder there, or set "
            f"{OUTSIDE_VARIABLE}=1 if you trust the file"
        )


def is_file(path: Path) -> bool:
    """True for a file; False also for a name that a file names and that no file can have."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _outside_allowed() -> bool:
    value = os.environ.get(OUTSIDE_VARIABLE, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise UnsupportedError(f"{OUTSIDE_VARIABLE}={value!r}; set it to 1 or 0")
