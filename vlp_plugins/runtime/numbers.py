"""Counts and shares as people write them: `1.82 M`, `63.0%`."""

from __future__ import annotations

_EXACT_BELOW = 1_000_000


def count(number: int) -> str:
    """`983,040`, and from a million on three digits: `1.82 M`, `7.24 B` (10^9), `1.05 T`."""
    if abs(number) < _EXACT_BELOW:
        return f"{number:,}"
    value = number / 1000
    for unit in (" M", " B", " T"):
        value /= 1000
        text = f"{value:#.3g}".rstrip(".")
        if "e" not in text:  # what is rounded up to 1000 has the next unit
            return text + unit
    return f"{value:,.0f} T"


def percent(share: float) -> str:
    """`63.0%` of 0.63; more digits where one would make 0% or 100% of what is neither."""
    for digits in range(1, 10):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or float(text[:-1]) not in (0, 100):
            break
    return text
