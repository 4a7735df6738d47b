"""Counts, shares, sizes and times as people write them: `1.82 M`, `63.0%`, `12.3 MB`, `4.2 s`."""

from __future__ import annotations

from collections.abc import Sequence

_EXACT_BELOW = 1_000_000


def count(number: int) -> str:
    """`983,040`, and from a million on three digits: `1.82 M`, `7.24 B` (10^9), `1.05 T`."""
    if abs(number) < _EXACT_BELOW:
        return f"{number:,}"
    return _three_digits(number / 1000, (" M", " B", " T"))


def size(amount: int) -> str:
    """Bytes on a disk, in powers of 1000: `12.3 MB`. For memory there is `memory.text_of`."""
    if amount < 1000:
        return f"{amount} bytes"
    return _three_digits(amount, (" kB", " MB", " GB", " TB"))


def _three_digits(value: float, units: Sequence[str]) -> str:
    """In the first unit, each a thousand of the one before, in which it is below 1000."""
    for unit in units:
        value /= 1000
        text = f"{value:#.3g}".rstrip(".")
        if "e" not in text:  # what is rounded up to 1000 has the next unit
            return text + unit
    return f"{value:,.0f}{units[-1]}"


def percent(share: float, digits: int = 1) -> str:
    """`63.0%` of 0.63; more digits where these would make 0% or 100% of what is neither."""
    for more in range(digits, 10):
        text = f"{share:.{more}%}"
        if share in (0, 1) or float(text[:-1]) not in (0, 100):
            break
    return text


def duration(seconds: float) -> str:
    """`4.2 s`, `12.5 min` or `3.1 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
