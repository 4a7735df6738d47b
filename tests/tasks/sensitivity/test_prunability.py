"""One number for a curve: what it is for curves that one can work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from curve_examples import DENSE, curve, found
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.tasks.sensitivity.curves import (
    Point,
    difference_of,
    jackknife_error,
    mean_over,
    prunabilities,
    prunability_of,
    tolerated,
)


def test_a_loss_that_never_changes_is_one():
    each = prunability_of(curve("vision 0", [1, 1, 1]), DENSE)
    assert (each.loss, each.tolerated, each.recall) == (1, 0.9, 1)


def test_trapezoids_by_hand():
    # 1 -> 0.5 over [0, 0.5], 0.5 -> 0.25 over [0.5, 1]
    assert mean_over([0.5, 1.0], [0.5, 0.25]) == pytest.approx(0.375 + 0.1875)


def test_what_is_not_finite_counts_as_nothing_left():
    assert mean_over([0.5, 1.0], [math.inf, math.nan]) == pytest.approx(0.25)


@given(st.floats(0.01, 100))
def test_the_unit_of_the_loss_does_not_matter(scale):
    steep = curve("vision 0", [1.1, 2, 5], wobble=0.1)

    def scaled(point: Point) -> Point:
        return replace(point, losses=tuple(scale * loss for loss in point.losses))

    other = replace(steep, points=tuple(map(scaled, steep.points)))
    one, two = prunability_of(steep, DENSE), prunability_of(other, scaled(DENSE))
    assert two.loss == pytest.approx(one.loss)
    assert two.error == pytest.approx(one.error)
    assert two.tolerated == pytest.approx(one.tolerated)


def test_the_order_of_the_points_does_not_matter():
    steep = curve("vision 0", [1.1, 2, 5])
    turned = replace(steep, points=steep.points[::-1])
    assert prunability_of(turned, DENSE) == prunability_of(steep, DENSE)


def test_a_higher_loss_anywhere_is_less_prunable():
    base = prunability_of(curve("vision 0", [1, 1.5, 3]), DENSE).loss
    for worse in ([1.1, 1.5, 3], [1, 1.6, 3], [1, 1.5, 4]):
        assert prunability_of(curve("vision 0", worse), DENSE).loss < base


def test_a_destroyed_model_is_not_prunable():
    dead = curve("vision 0", [math.inf] * 3)
    each = prunability_of(dead, DENSE)
    assert each.loss == pytest.approx(0.25 / 0.9)  # the line from dense to the first point
    assert each.tolerated == 0


def test_the_tolerated_sparsity_lies_between_points():
    assert tolerated([0.5, 0.75], [0.0, 0.2], 0.05) == pytest.approx(0.5 + 0.25 / 4)
    assert tolerated([0.5, 0.75], [0.01, 0.02], 0.05) == 0.75
    assert tolerated([0.5], [0.1], 0.05) == pytest.approx(0.25)
    assert tolerated([0.5, 0.75], [-0.1, math.inf], 0.05) == 0.5
    assert tolerated([0.5, 0.75], [0.2, 0.0], 0.05) == pytest.approx(0.125)  # the first crossing


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 4.0, 2.0, 7.0]
    partial = [(sum(values) - value) / 3 for value in values]
    mean = sum(values) / 4
    expected = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
    assert jackknife_error(partial) == pytest.approx(expected)
    assert jackknife_error([1.0]) is None


def test_batches_that_agree_leave_no_error_and_those_that_do_not_leave_some():
    assert prunability_of(curve("vision 0", [1, 2, 3]), DENSE).error == pytest.approx(0, abs=1e-12)
    assert prunability_of(curve("vision 0", [1, 2, 3], wobble=0.3), DENSE).error > 0.01


def test_the_error_of_a_difference_is_that_of_pairs():
    """Both curves wobble alike from batch to batch: their difference does not."""
    one = curve("vision", [1, 2, 3], "modality", wobble=0.3)
    difference, error = difference_of(one, replace(one), DENSE)
    assert (difference, error) == (0, 0)
    other = curve("text", [1, 2.2, 3.5], "modality", wobble=0.3)
    difference, error = difference_of(one, other, DENSE)
    assert difference > 0
    assert 0 < error < prunability_of(one, DENSE).error


def test_one_batch_gives_no_error():
    single = replace(DENSE, losses=(1.0,))
    points = (Point(0.5, 1, (2.0,)),)
    each = prunability_of(replace(curve("vision 0", [1, 1, 1]), points=points), single)
    assert each.error is None


def test_recall_is_compared_with_the_dense_one():
    each = prunability_of(curve("vision 0", [1, 2, 4]), DENSE)
    assert each.recall == pytest.approx(mean_over([0.5, 0.75, 0.9], [1, 0.5, 0.25]))
    blind = replace(DENSE, image_to_text=0.0, text_to_image=0.0)
    assert prunability_of(curve("vision 0", [1, 2, 4]), blind).recall is None


def test_a_loss_that_is_not_positive_has_no_ratio():
    with pytest.raises(UnsupportedError, match="loss of the dense model is -1;.*positive"):
        prunability_of(curve("vision 0", [1, 1, 1]), Point(0, 0, (-1.0,)))


def test_every_curve_has_a_number():
    names = [p.group.title for p in prunabilities(found(curve("vision 0", [1, 1, 1]),
                                                         curve("text 0", [1, 2, 3])))]  # fmt: skip
    assert names == ["vision 0", "text 0"]


def test_rises_and_their_errors():
    point = curve("vision 0", [1, 2, 3], wobble=0.5).points[1]
    assert point.rise(DENSE) == pytest.approx((2 + 5 + 3) / 4.5 - 1)
    apart_by_batch = [1.0, 3.0, 1.5]
    mean = sum(apart_by_batch) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in apart_by_batch) / 2)
    assert point.rise_error(DENSE) == pytest.approx(deviation / math.sqrt(3) / 1.5)
    lost = replace(point, losses=(1.0, math.inf, 1.0))
    assert lost.rise(DENSE) == math.inf
    assert lost.rise_error(DENSE) is None
