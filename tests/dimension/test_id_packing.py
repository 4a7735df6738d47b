"""Which layers are gathered together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.dimension.points import Need, fits, pack
from vlp_plugins.runtime.errors import UnsupportedError


def needs_of(*parts: tuple[str, int, int]) -> list[Need]:
    return [Need(f"fc{i}", stream, held, work) for i, (stream, held, work) in enumerate(parts)]


def greedy(needs: list[Need], budget: int) -> int:
    """Number of passes if each takes as much as it can: nothing contiguous needs fewer."""
    passes = start = 0
    while start < len(needs):
        stop = start + 1
        while stop < len(needs) and fits(needs[start : stop + 1], budget):
            stop += 1
        passes, start = passes + 1, stop
    return passes


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10), st.integers(0, 5)), min_size=1, max_size=20),
    streams=st.integers(1, 4),
    budget=st.integers(15, 60),
)
def test_passes_are_as_few_as_can_be_and_stay_in_the_budget(sizes, streams, budget):
    count = len(sizes)
    needs = needs_of(*((str(i * streams // count), *size) for i, size in enumerate(sizes)))
    passes = pack(needs, budget)
    assert len(passes) == greedy(needs, budget)
    assert [index for start, stop in passes for index in range(start, stop)] == [*range(count)]
    assert all(fits(needs[start:stop], budget) for start, stop in passes)


def test_a_pass_stops_at_the_end_of_a_stream_if_the_rest_fits_into_the_next():
    needs = needs_of(*[("vision", 3, 1)] * 2, *[("text", 3, 1)] * 2)
    assert pack(needs, 10) == [(0, 2), (2, 4)]


def test_all_that_fits_is_one_pass_and_nothing_is_none():
    assert pack(needs_of(("vision", 5, 1), ("text", 4, 2)), 11) == [(0, 2)]
    assert pack([], 10) == []


def test_a_layer_that_does_not_fit_is_told_with_what_to_do():
    needs = needs_of(("vision", 5, 1), ("text", 2048, 1024))
    with pytest.raises(UnsupportedError) as error:
        pack(needs, 100)
    message = str(error.value)
    assert "fc1" in message
    assert "2.0 KiB" in message
    assert "limit" in message
    assert "bfloat16" in message
    assert "memory_budget=3072" in message
