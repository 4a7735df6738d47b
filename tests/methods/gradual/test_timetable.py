"""When masks are chosen, and how much they remove then."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.methods.gradual.rising_masks import Timetable, default_warmup
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.scoring.schedules import SCHEDULES, at_step


@st.composite
def timetables(draw):
    before, rise, after = (draw(st.integers(low, 60)) for low in (0, 1, 0))
    return Timetable(
        before + rise + after,
        before,
        after,
        draw(st.integers(1, 20)),
        draw(st.sampled_from(sorted(SCHEDULES))),
    )


@given(times=timetables(), target=st.floats(0, 1, exclude_max=True))
def test_it_is_nothing_then_rises_then_is_exactly_the_target(times, target):
    levels = [times.level(target, step) for step in range(times.steps + 1)]

    assert all(level == 0 for level in levels[: times.before + 1])
    assert all(level == target for level in levels[times.last :])
    assert all(0 <= low <= high <= target for low, high in pairwise(levels))


@given(times=timetables())
def test_masks_are_chosen_on_the_way_and_last_when_the_target_is_reached(times):
    chosen = [step for step in range(1, times.steps + 5) if times.chooses(step)]

    assert chosen[-1] == times.last
    assert all(step % times.every == 0 for step in chosen[:-1])
    assert all(step > times.before for step in chosen)
    assert all(high - low <= times.every for low, high in pairwise(chosen))
    assert chosen[0] <= times.before + times.every


def test_the_cubic_rise_is_that_of_the_papers():
    for step in range(101):
        expected = 0.0
        if step > 10:
            expected = 0.9 * (1 - (1 - min(1, (step - 10) / 60)) ** 3)
        assert at_step(step, 100, 0.9, before=10, after=30) == pytest.approx(expected, abs=1e-12)


def test_every_modality_rises_to_its_own_target():
    times = Timetable(10, 2, 2, 1)

    assert times.level({"vision": 0.4, "text": 0.8}, 8) == {"vision": 0.4, "text": 0.8}
    half = times.level({"vision": 0.4, "text": 0.8}, 5)
    assert half["text"] == pytest.approx(2 * half["vision"])
    assert half["vision"] == pytest.approx(0.4 * (1 - 0.5**3))


def test_windows_end_in_the_initial_warm_up_too_and_never_after_the_last_choice():
    times = Timetable(20, 6, 5, 3)

    assert [step for step in range(1, 21) if times.window_ends(step)] == [3, 6, 9, 12, 15]
    assert [step for step in range(1, 21) if times.chooses(step)] == [9, 12, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, 5), "leave 0 for"),
        ((10, -1, 0), "warm-ups of -1"),
        ((0,), "of 0 steps"),
        ((10, 0, 0, 0), "every=0"),
        ((10, 0, 0, 1, "quartic"), "unknown schedule 'quartic'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(SparsityError, match=message):
        Timetable(*arguments)


@given(steps=st.integers(1, 10_000))
def test_the_default_warm_ups_leave_most_of_the_steps(steps):
    before, after = default_warmup(steps)

    assert steps - before - after >= 0.7 * steps
