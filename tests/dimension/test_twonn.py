"""Intrinsic dimensions of point clouds: published values, invariances, errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_clouds import naive_nearest_two, normal, torus
from safetensors.torch import load_file

from vlp_plugins.dimension.twonn import (
    ConstantError,
    Estimator,
    disjoint_blocks,
    estimate,
    slope,
)
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError, UnsupportedError

GOLDEN = Path(__file__).parents[1] / "golden" / "id"
RECORDED = json.loads((GOLDEN / "expected.json").read_text())
CLOUDS = load_file(GOLDEN / "points.safetensors")
PUBLISHED = Estimator(blocks=20, duplicates="exact")


def curved(n=120, dimension=3, coordinates=50, seed=0):
    hidden = torch.tanh(normal(n, dimension, seed) @ normal(dimension, 20, seed + 1))
    return hidden @ normal(20, coordinates, seed + 2)


def usable_ratios(points):
    r1, r2 = (torch.tensor(r, dtype=torch.float64) for r in naive_nearest_two(points))
    return (r2 / r1)[(r1 > 0) & (r1 < r2)]


def test_published_dimensions():
    """One of the recorded clouds; `tests/parity` has all of them."""
    name = "hypercube_d5_with_20_duplicates"
    expected = RECORDED[name]

    found = estimate(CLOUDS[name], PUBLISHED)

    assert found.block_dimensions == pytest.approx(expected["block_dims"], rel=1e-5)
    assert found.block_deviations == pytest.approx(expected["block_stds"], rel=1e-3)
    assert found.dimension == pytest.approx(expected["id_mean_over_blocks"], rel=1e-5)
    assert [b.shape[1] for b in disjoint_blocks(1000, PUBLISHED)] == expected["block_npoints"]


def test_all_points_are_the_default():
    name = "hypercube_d5_with_20_duplicates"

    found = estimate(CLOUDS[name])

    assert found.dimension == pytest.approx(RECORDED[name]["slope_all_points"], rel=1e-5)
    assert found.block_dimensions == (found.dimension,)
    assert found.block_deviations == (0.0,)
    assert found.used == len(usable_ratios(CLOUDS[name])) - 2


@pytest.mark.parametrize(
    "estimator", [Estimator(), Estimator("likelihood", 0.1), Estimator(blocks=4)]
)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1e-3,
        lambda x: x + 30,
        lambda x: x @ torch.linalg.qr(normal(50, 50).double()).Q,
        lambda x: torch.cat([x, torch.zeros(len(x), 7)], 1),
        lambda x: x.double(),
    ],
    ids=["scaled", "moved", "turned", "padded", "float64"],
)
def test_what_keeps_ratios_of_distances_keeps_the_dimension(change, estimator):
    points = curved().double()

    one, other = estimate(points, estimator), estimate(change(points), estimator)

    assert other.dimension == pytest.approx(one.dimension, rel=1e-5)
    assert other.error == pytest.approx(one.error, rel=1e-5)
    assert other.used == one.used


def test_the_order_of_points_is_irrelevant_for_all_points():
    points = curved()
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))

    assert estimate(points[order]).dimension == pytest.approx(estimate(points).dimension, rel=1e-6)


def test_a_huge_common_offset():
    points = normal(200, 1000)

    moved = points + 1e4  # float32 keeps three digits of the spread, and these decide

    assert estimate(moved).dimension == pytest.approx(estimate(moved.double()).dimension, rel=1e-4)


def test_half_precision_is_what_its_values_say():
    points = curved().bfloat16()

    assert estimate(points).dimension == pytest.approx(
        estimate(points.double()).dimension, rel=1e-5
    )


def test_points_without_a_ratio_are_left_out():
    """Duplicates have r1 = 0; a square's corner has two neighbours equally near."""
    cloud = curved(60, coordinates=2)
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    points = torch.cat([cloud, torch.full((2, 2), -1000.0), 1000 + square])

    found = estimate(points)

    ratios = usable_ratios(points)
    assert len(ratios) == 60
    assert found.used == 58
    assert found.dimension == pytest.approx(slope(ratios.log()).dimension, rel=1e-5)


@given(
    roundoffs=st.floats(0.5, 60),
    wide=st.booleans(),
    offset=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=20, deadline=None)
def test_copies_that_differ_by_rounding_are_copies(roundoffs, wide, offset, seed):
    """As those of a sample in batches of other sizes; float64 points are judged as float32."""
    flat = normal(300, 2, seed) + offset
    points = flat @ normal(2, 40, seed + 1) if wide else flat
    noise = normal(10, points.shape[1], seed + 2)
    noise *= (
        roundoffs * 2.0**-24 * points[:10].norm(dim=1, keepdim=True) / noise.norm(dim=1)[:, None]
    )
    exact = estimate(torch.cat([points, points[:10]]))

    for copies in (points[:10] + noise, points[:10].double() + noise):
        found = estimate(torch.cat([points.to(copies.dtype), copies]))
        assert found.dimension == pytest.approx(exact.dimension, rel=1e-3)
        assert (found.duplicates, found.used) == (exact.duplicates, exact.used)


def test_duplicates_of_a_reported_case():
    points = normal(500, 2)
    copies = torch.cat([points, points[:10] * (1 + 1e-7)])

    plain, found = estimate(points), estimate(copies)
    exact = estimate(torch.cat([points, points[:10]]))

    assert (plain.duplicates, exact.duplicates, found.duplicates) == (0, 20, 20)
    assert abs(plain.dimension - exact.dimension) < 0.1
    assert found.dimension == pytest.approx(exact.dimension, rel=1e-4)
    assert estimate(copies, replace(PUBLISHED, blocks=1)).dimension < 1, "as published"


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_all_points_leave_nothing(copies):
    points = normal(40, 5).repeat(copies, 1)
    points *= 1 + 1e-7 * torch.arange(len(points))[:, None].remainder(3)

    with pytest.raises(StatisticsError, match=f"0 of {40 * copies} .*; {40 * copies} equal"):
        estimate(points)


def test_points_that_differ_by_rounding_alone_are_all_equal():
    points = normal(1, 30).repeat(50, 1) * (1 + 1e-7 * torch.arange(50)[:, None].remainder(5))

    with pytest.raises(StatisticsError, match="all 50 are equal"):
        estimate(points)


def test_points_that_differ_by_how_often_the_same_is_there_have_no_dimension():
    """What reads learned queries alone gives the same for every image, and a sample has several."""
    queries = normal(1, 6)[0]
    none, one, two = (torch.cat([queries.repeat(n), torch.zeros(6 * (2 - n))]) for n in range(3))
    points = torch.stack([two, *(one,) * 30, *(two,) * 20, none])

    for estimator in (Estimator(), Estimator(duplicates="exact")):
        with pytest.raises(ConstantError, match="all 52 are equal"):
            estimate(points, estimator)
    points[5, 0] += 0.1
    with pytest.raises(StatisticsError, match="usable") as caught:
        estimate(points)
    assert not isinstance(caught.value, ConstantError)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_dimension_of_a_torus(dimension):
    points = torus(500, dimension, torch.Generator().manual_seed(dimension))

    for fit in ("slope", "likelihood"):
        found = estimate(points, Estimator(fit))
        assert abs(found.dimension - dimension) < 3 * found.error < dimension / 2


@pytest.mark.parametrize("estimator", [Estimator(), Estimator("likelihood", 0.1)])
def test_the_error_is_how_much_estimates_vary(estimator):
    """On many tori, which have no boundary, and whose dimension is seen without bias."""
    generator = torch.Generator().manual_seed(0)
    found = [estimate(torus(100, 2, generator), estimator) for _ in range(120)]

    dimensions = torch.tensor([f.dimension for f in found])
    errors = torch.tensor([f.error for f in found])
    assert errors.square().mean().sqrt() == pytest.approx(float(dimensions.std()), rel=0.2)
    covered = ((dimensions - 2).abs() < 2 * errors).double().mean()
    assert 0.87 < covered < 0.99


def test_the_error_of_a_mean_over_blocks():
    generator = torch.Generator().manual_seed(0)
    found = [estimate(torus(100, 3, generator), Estimator(blocks=5)) for _ in range(50)]

    spread = float(torch.tensor([f.dimension for f in found]).std())
    stated = float(torch.tensor([f.error for f in found]).square().mean().sqrt())
    assert 0.6 * spread < stated < 1.3 * spread


def test_blocks_are_disjoint_and_reproducible():
    blocks = disjoint_blocks(103, PUBLISHED)

    for b, block in enumerate(blocks, start=1):
        assert block.shape == (b, 103 // b)
        assert len(block.unique()) == block.numel()
    again = disjoint_blocks(103, PUBLISHED)
    assert all(torch.equal(one, other) for one, other in zip(blocks, again, strict=True))
    assert not torch.equal(blocks[0], disjoint_blocks(103, Estimator(seed=124))[0])


@pytest.mark.parametrize(
    ("points", "estimator", "error", "message"),
    [
        (normal(19, 5), Estimator(), StatisticsError, "fc1: 19 are too few, .* needs 20"),
        (torch.zeros(0, 5), Estimator(), StatisticsError, "fc1: 0 are too few"),
        (
            normal(100, 5),
            PUBLISHED,
            StatisticsError,
            "fc1: 100 in 20 blocks leave 5 in each.* 400 samples or more, or at most 5 blocks",
        ),
        (torch.ones(50, 5) / 3, Estimator(), StatisticsError, "fc1: all 50 are equal"),
        (normal(25, 5).repeat(2, 1), Estimator(), StatisticsError, "0 of 50.*50 equal another"),
        (normal(10, 5).repeat(5, 1), Estimator(), StatisticsError, "fc1: 0 of 50 are usable"),
        (torch.eye(30), Estimator(), StatisticsError, "30 have two neighbours equally near"),
        (
            torch.cat([normal(26, 5), normal(7, 5, seed=1).repeat(2, 1)]),
            Estimator(blocks=2),
            StatisticsError,
            "block [12] of 2 of the fc1: 1[0-9] of 20 are usable",
        ),
        (torch.full((50, 5), torch.nan), Estimator(), NonFiniteError, "fc1: 50 of 50 hold NaN"),
        (torch.zeros(30), Estimator(), StatisticsError, "fc1: floating points .* needed"),
    ],
)  # fmt: skip
def test_what_has_no_dimension_says_why(points, estimator, error, message):
    with pytest.raises(error, match=message):
        estimate(points, estimator, what="fc1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fit": "slop"}, "fit 'slop' is unknown .did you mean 'slope'"),
        ({"drop": 1.0}, "drop is a fraction from 0 to 0.9, not 1.0"),
        ({"drop": -0.1}, "not -0.1"),
        ({"drop": float("nan")}, "not nan"),
        ({"blocks": 0}, "blocks is 1 .all points. or more, not 0"),
        ({"seed": -1}, "seed is a number from 0"),
        ({"duplicates": "exakt"}, "duplicates 'exakt' is unknown .did you mean 'exact'"),
    ],
)
def test_an_estimator_that_cannot_be(wrong, message):
    with pytest.raises(UnsupportedError, match=message):
        Estimator(**wrong)
