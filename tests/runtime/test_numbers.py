"""Counts, shares and sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.runtime.numbers import count, percent, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_216, "9,216"),
        (999_999, "999,999"),
        (1_000_000, "1.00 M"),
        (1_818_624, "1.82 M"),
        (9_994_999, "9.99 M"),
        (9_995_001, "10.0 M"),
        (226_492_416, "226 M"),
        (999_600_000, "1.00 B"),
        (7_241_732_096, "7.24 B"),
        (10**12, "1.00 T"),
        (10**16, "10,000 T"),
    ],
)
def test_a_count(number, text):
    assert count(number) == text


@given(st.integers(min_value=10**6, max_value=10**15 - 10**12))
def test_three_digits_are_right(number):
    digits, unit = count(number).split()
    assert len(digits.replace(".", "")) == 3
    size = {"M": 10**6, "B": 10**9, "T": 10**12}[unit]
    assert abs(float(digits) * size - number) <= 0.00501 * number


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0%"), (1, "100.0%"), (0.63, "63.0%"), (0.9996, "99.96%"), (0.99949, "99.9%"),
        (0.0004, "0.04%"), (1e-7, "0.00001%"), (-0.2, "-20.0%"),
    ],
)  # fmt: skip
def test_a_share(share, text):
    assert percent(share) == text


def test_a_whole_share():
    assert [percent(s, 0) for s in (0.5, 0.994, 0.996, 1.0, 0)] == [
        "50%", "99%", "99.6%", "100%", "0%"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"),
        (9_999_999, "10.0 MB"), (999_600, "1.00 MB"), (3 * 10**15, "3,000 TB"),
    ],
)  # fmt: skip
def test_a_size(amount, text):
    assert size(amount) == text
