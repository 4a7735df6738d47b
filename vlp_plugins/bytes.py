"""Amounts of memory as people write them."""

from __future__ import annotations

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
