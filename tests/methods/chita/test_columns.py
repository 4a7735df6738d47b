"""Where weights and blocks lie in the columns."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_loss import LosingAdapter, losing_toy
from toy_rows import toy_columns

from vlp_plugins.methods.chita.rows.plan import (
    Columns,
    block_bounds,
    column_groups,
    part_bounds_of,
    shares_of,
)
from vlp_plugins.models.weights import WeightMap

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=8)


def columns_of(numbers: list[int], block_size: int | None) -> Columns:
    starts = [0]
    for number in numbers:
        starts.append(starts[-1] + number)
    bounds = None if block_size is None else block_bounds(tuple(starts), block_size)
    names = tuple(map(str, range(len(numbers))))
    return Columns(names, tuple((number,) for number in numbers), tuple(starts), bounds)


def test_joined_weights_are_split_into_the_same_weights():
    weights = WeightMap.of(losing_toy(), LosingAdapter())
    columns = toy_columns()
    values = {name: weight.parameter.detach() for name, weight in weights.items()}
    joined = columns.join(values)
    assert joined.shape == (weights.numel,)
    parts = columns.split(joined)
    assert list(parts) == list(weights)
    assert all(torch.equal(parts[name], values[name]) for name in values)
    assert all(part.data_ptr() >= joined.data_ptr() for part in parts.values()), "views"


def test_masks_stay_bool_and_bfloat16_weights_become_float32():
    weights = WeightMap.of(losing_toy().bfloat16(), LosingAdapter())
    columns = Columns.of(weights, None)
    values = {name: weight.parameter.detach() for name, weight in weights.items()}
    assert columns.join(values).dtype == torch.float32
    masks = {name: value > 0 for name, value in values.items()}
    assert columns.join(masks).dtype == torch.bool
    assert columns.join(masks).sum() == sum(mask.sum() for mask in masks.values())


def test_blocks_are_cut_as_the_published_list_has_them():
    """As recorded for BLIP at block size 200: weights of 1728, 576 and 2304 elements, then 150."""
    bounds = block_bounds((0, 1728, 2304, 4608, 4758), 200)
    assert bounds[:13] == (0, 0, 216, 432, 648, 864, 1080, 1296, 1512, 1728, 1728, 2016, 2304)
    assert bounds[13:19] == (2304, 2513, 2722, 2931, 3140, 3349)
    assert bounds[-3:] == (4603 - 209, 4608, 4758)


@given(sizes, st.integers(1, 120))
def test_blocks_never_cross_a_weight_and_are_about_as_large_as_asked(numbers, block_size):
    columns = columns_of(numbers, block_size)
    bounds = columns.bounds
    assert bounds is not None
    assert (bounds[0], bounds[-1]) == (0, columns.p)
    assert list(bounds) == sorted(bounds)
    assert set(columns.starts) <= set(bounds)
    for start, stop in pairwise(bounds):
        assert stop - start < 2 * block_size
    assert columns.widest == max(stop - start for start, stop in pairwise(bounds))


@given(sizes, st.data())
def test_pieces_cover_exactly_the_columns_asked_for(numbers, data):
    columns = columns_of(numbers, None)
    start = data.draw(st.integers(0, columns.p))
    stop = data.draw(st.integers(start, columns.p))
    covered = []
    for name, first, last, column in columns.pieces(start, stop):
        assert column == columns.starts[int(name)] + first
        covered += range(column, column + last - first)
    assert covered == list(range(start, stop))


@given(
    sizes,
    st.one_of(st.none(), st.integers(1, 120)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 400),
)
def test_every_cut_is_at_a_block_and_nothing_is_lost(numbers, block_size, processes, n, elements):
    columns = columns_of(numbers, block_size)
    edges = shares_of(columns, processes)
    cuts = part_bounds_of(columns, n, edges, elements)
    groups = column_groups(cuts, max(200, elements // n))
    for rank in range(processes):
        own = cuts[rank]
        assert own[0] == edges[rank]
        assert own[-1] == edges[rank + 1]
        assert all(a < b for a, b in pairwise(own))
        if columns.bounds is not None:
            assert set(own) <= set(columns.bounds)
        parts = [pair for group in groups for pair in pairwise(group[rank])]
        assert parts == list(pairwise(own))


def test_processes_hold_about_equal_shares():
    columns = columns_of([1000] * 30, 50)
    shares = [b - a for a, b in pairwise(shares_of(columns, 7))]
    assert sum(shares) == 30_000
    assert max(shares) - min(shares) <= 50
