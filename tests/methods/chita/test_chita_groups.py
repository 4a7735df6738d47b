"""Weights of one modality as a problem of their own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from vlp_plugins.methods.chita.pruner import Group, GroupRows, Pruner, put_ranges, take_ranges
from vlp_plugins.methods.chita.rows.plan import Columns
from vlp_plugins.methods.chita.solver.problem import MemoryRows

RANGES = [(0, 5), (9, 12), (20, 30)]


class InParts(MemoryRows):
    """Cut at places that no range respects, unless there are blocks."""

    def __init__(self, matrix, cuts):
        super().__init__(matrix)
        self._cuts = cuts


@pytest.fixture
def matrix():
    return torch.randn(4, 30, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cuts", [[0, 30], [0, 3, 10, 21, 30], [0, 5, 9, 12, 20, 30]])
def test_the_columns_of_the_ranges_come_in_order(matrix, cuts):
    rows = GroupRows(InParts(matrix, cuts), RANGES)

    found = torch.full((4, rows.p), torch.nan)
    for start, part in rows.parts():
        found[:, start : start + part.shape[1]] = part

    assert torch.equal(found, torch.cat([matrix[:, a:b] for a, b in RANGES], 1))
    assert (rows.n, rows.p, rows.sweeps) == (4, 18, 1)


COLUMNS = Columns(("a", "b", "c", "d", "e"), ((5,), (4,), (3,), (8,), (10,)), (0, 5, 9, 12, 20, 30))


def test_columns_of_some_weights_keep_their_blocks_and_are_pushed_together():
    blocked = replace(COLUMNS, bounds=(0, 2, 5, 9, 12, 20, 25, 30))

    found = blocked.only(["a", "c", "e"])

    assert found.bounds == (0, 2, 5, 8, 13, 18)
    assert (found.names, found.starts) == (("a", "c", "e"), (0, 5, 8, 18))
    assert found.shapes == ((5,), (3,), (10,))
    assert COLUMNS.only(["a", "c", "e"]).bounds is None
    assert COLUMNS.ranges(["a", "c", "e"]) == RANGES
    assert COLUMNS.ranges(["b", "c", "e"]) == [(5, 12), (20, 30)]


def test_gather_and_spread_are_inverse():
    whole = torch.arange(30)
    empty = torch.zeros(30, dtype=whole.dtype)

    put_ranges(take_ranges(whole, RANGES), empty, RANGES)

    inside = torch.zeros(30, dtype=torch.bool)
    for start, stop in RANGES:
        inside[start:stop] = True
    assert torch.equal(empty, whole.where(inside, torch.tensor(0)))


def test_entries_of_other_processes_are_filled_in(matrix):
    class Distributed(MemoryRows):
        def fill(self, vector):
            vector[25:] = 7  # what another process has
            return vector

    rows = GroupRows(Distributed(matrix), RANGES)

    assert rows.fill(torch.ones(18)).tolist() == [1] * 13 + [7] * 5


@pytest.mark.parametrize("bounds", [None, (0, 5, 9, 12, 20, 30)])
def test_groups_are_solved_as_if_each_were_alone(matrix, bounds):
    dense = torch.randn(30, generator=torch.Generator().manual_seed(1))
    columns = replace(COLUMNS, bounds=bounds)
    spans = dict(zip(columns.names, pairwise(columns.starts), strict=True))
    one, other = Group(("a", "c", "e"), 7), Group(("b", "d"), 5)

    pruner = Pruner(dense, MemoryRows(matrix, bounds), columns, "published", 0.0)
    together = next(pruner.solve([([one, other], 0.3)]))()

    objective = 0.0
    for group in (one, other):
        ranges = [spans[name] for name in group.names]
        chosen = torch.cat([torch.arange(a, b) for a, b in ranges])
        alone = columns.only(group.names).bounds
        pruner = Pruner(
            dense[chosen],
            MemoryRows(matrix[:, chosen], alone),
            Columns(("all",), ((len(chosen),),), (0, len(chosen)), alone),
            "published",
            0.0,
        )
        found = next(pruner.solve([([Group(("all",), group.keep)], 0.3)]))()
        assert int(found.support.sum()) == group.keep
        assert torch.equal(together.support[chosen], found.support)
        assert torch.allclose(together.values[chosen], found.values)
        objective += found.objective
    assert together.objective == pytest.approx(objective)
