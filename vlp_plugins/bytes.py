"""Amounts of memory as people write them, and the most that reading a file may take."""

from __future__ import annotations

import os
import re

from vlp_plugins.errors import UnsupportedError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def bytes_of(amount: int | str) -> int:
    """`"8GiB"`, `"500 MB"` or a number of bytes.

    Raises:
        UnsupportedError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(amount).strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or (found := int(float(match[1]) * factor)) < 1:
        raise UnsupportedError(f"{amount!r} is no amount of memory; write for instance 8GiB")
    return found


def text_of(amount: int) -> str:
    """`8.0 GiB`."""
    value = float(amount)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if unit != "bytes" else f"{amount} bytes"
        value /= 1024
    return f"{value:.1f} TiB"


LIMIT_VARIABLE = "VLP_READ_LIMIT"
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
            f"{LIMIT_VARIABLE}={text_of(max(size, 2**20)).replace(' ', '')}"
        )
