"""Distances to the two nearest neighbours, against a loop over all pairs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_clouds import naive_nearest_two, normal

from benchmarks.memory import peak_memory
from vlp_plugins.dimension import neighbours as neighbours_module
from vlp_plugins.dimension.neighbours import (
    nearest_in_blocks,
    squared_distances,
    working_bytes,
)
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError


def nearest_two(points, what="points"):
    """Distances to the two nearest of all other points."""
    everything = torch.arange(len(points), device=points.device).unsqueeze(0)
    (found,) = nearest_in_blocks(points, [everything], what=what)
    return found.r1[0], found.r2[0]


def assert_nearest(points, found, tolerance=2e-6):
    for mine, naive in zip(found, naive_nearest_two(points), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(
            mine, torch.tensor(naive, dtype=torch.float64), rtol=tolerance, atol=0
        )


@pytest.fixture
def measured(monkeypatch):
    """The pairs that each call measured, and in which dtype."""
    calls = []

    def spy(points, pairs, dtype):
        calls.append((pairs, dtype))
        return squared_distances(points, pairs, dtype)

    monkeypatch.setattr(neighbours_module, "squared_distances", spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "coordinates"), [(3, 1), (40, 5), (130, 2500), (70, 5000)])
def test_any_dtype_and_size(n, coordinates, dtype):
    points = normal(n, coordinates).to(dtype)

    assert_nearest(points, nearest_two(points))


@given(
    n=st.integers(3, 40),
    coordinates=st.integers(1, 12),
    levels=st.integers(1, 5),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_many_duplicates_and_ties(n, coordinates, levels, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(levels, (n, coordinates), generator=generator) * scale

    assert_nearest(points, nearest_two(points))


def test_a_huge_common_offset_is_taken_off():
    points = normal(150, 3000) + 1e4

    assert_nearest(points, nearest_two(points))


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_values_whose_squares_float32_cannot_hold(size):
    points = normal(30, 50) * size

    assert_nearest(points, nearest_two(points))


def test_clusters_far_narrower_than_their_distances(measured):
    """Where float32 products tell nothing about the distances, those of float64 do."""
    points = normal(6, 200).repeat_interleave(30, 0) * 1e3 + normal(180, 200, seed=1) * 1e-2

    assert_nearest(points, nearest_two(points))
    assert {dtype for _, dtype in measured} == {torch.float64}
    assert sum(len(pairs) for pairs, _ in measured) < 180 * 6


def test_a_candidate_list_that_is_too_short_is_widened(measured, monkeypatch):
    """Whatever the bound of the error leaves open is measured sooner or later."""
    monkeypatch.setattr(neighbours_module, "product_error", lambda points, dtype: 0.5)
    monkeypatch.setattr(neighbours_module, "_CANDIDATES", 2)
    points = normal(40, 30)

    assert_nearest(points, nearest_two(points))
    assert len(measured) > 1


def test_no_pair_is_measured_twice(measured):
    points = normal(120, 40)
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.randperm(120, generator=generator)[: 120 // b * b].view(b, -1) for b in range(1, 6)
    ]

    found = nearest_in_blocks(points, blocks)

    for block, near in zip(blocks, found, strict=True):
        for row, positions in enumerate(block):
            assert_nearest(points[positions], (near.r1[row], near.r2[row]))
            inside = points[positions].double()
            lengths = (inside - inside[near.second[row]]).square().sum(1).sqrt()
            torch.testing.assert_close(lengths, near.r2[row], rtol=2e-6, atol=0)
            assert not (near.first[row] == near.second[row]).any()
    pairs = torch.cat([pairs for pairs, _ in measured])
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(pairs.unique(dim=0)) == len(pairs) < 120 * 5 * 2


def test_exact_duplicates_are_at_distance_zero():
    points = normal(60, 700) / 3
    points[[10, 20, 30]] = points[[0, 0, 5]]

    r1, r2 = nearest_two(points)

    assert (r1 == 0).nonzero().flatten().tolist() == [0, 5, 10, 20, 30]
    assert (r2 == 0).nonzero().flatten().tolist() == [0, 10, 20]


def test_the_order_of_points_is_irrelevant():
    points = normal(80, 1500)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))

    for one, other in zip(nearest_two(points), nearest_two(points[order]), strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-6, atol=0)


def test_the_number_of_threads_is_irrelevant():
    points = normal(90, 9000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(nearest_two(points))
    finally:
        torch.set_num_threads(before)

    for r1, r2 in found[1:]:
        torch.testing.assert_close(r1, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(r2, found[0][1], rtol=1e-12, atol=0)


def test_points_stay_as_they_were():
    points = normal(30, 20).requires_grad_()
    before = points.detach().clone()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_two(points)

    assert torch.equal(points, before)
    assert not found[0].requires_grad
    assert_nearest(before, found)


def test_rows_of_a_larger_tensor():
    whole = normal(50, 4000)

    points = whole[:40, 100:3100]

    assert not points.is_contiguous()
    assert_nearest(points, nearest_two(points))


def test_the_stated_memory_is_enough():
    points = normal(600, 40_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with peak_memory() as meter:
            nearest_two(points)
        stated = working_bytes(600, 40_000)
    finally:
        torch.set_num_threads(before)

    assert meter.extra <= stated < points.nbytes


def test_memory_hardly_depends_on_the_coordinates():
    assert (
        working_bytes(100, 5_000, 1)
        == working_bytes(100, 600_000, 1)
        == working_bytes(100, threads=1)
    )
    assert working_bytes(100, 64, 1) < working_bytes(100, 5_000, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_nan_and_infinity_are_named(value, dtype):
    points = normal(40, 30).to(dtype)
    points[7, 3] = points[11, 29] = value

    with pytest.raises(NonFiniteError, match=r"text\.3\.mlp: 2 of 40 .* first is number 7"):
        nearest_two(points, what="text.3.mlp")


@pytest.mark.parametrize(
    "points", [torch.zeros(2, 5), torch.zeros(5), torch.zeros(5, 3, dtype=torch.int64)]
)
def test_what_is_no_three_points_is_refused(points):
    with pytest.raises(StatisticsError, match="vision.fc1: .*(3 or more|are needed)"):
        nearest_two(points, what="vision.fc1")
