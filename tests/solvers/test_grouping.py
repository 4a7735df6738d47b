"""Blocks in groups: each once, little memory, and about as much for every thread."""

from itertools import pairwise

import pytest
import torch

from vlp_plugins.solvers.grouping import GROUP, Group, groups_of


@pytest.mark.parametrize("kept", [[2500] * 10, [0] * 5, [7], [5000, 0, 0, 100, 2500, 2500, 9]])
def test_groups_of_blocks_hold_each_once_and_take_little_memory(kept):
    n = 128
    groups = groups_of(kept, n)
    assert [i for group in groups for i in range(len(kept))[group]] == list(range(len(kept)))
    for group in groups:
        sizes = [n * (columns + 3 * n) for columns in kept[group]]
        assert sum(sizes) <= GROUP + max(sizes)


def test_two_cores_get_as_many_blocks_each():
    groups = groups_of([2500] * 10, 128)
    assert sorted(group.stop - group.start for group in groups) == [2, 2, 3, 3]


def test_views_are_the_columns_and_the_support_of_every_block():
    draw = torch.Generator().manual_seed(0)
    part, weights = torch.randn(3, 20, generator=draw), torch.randn(20, generator=draw)
    inside = torch.zeros(20, dtype=torch.bool)
    inside[[0, 1, 6, 19]] = True
    edges = [0, 2, 6, 15, 20]  # all kept, none, one, one

    group = Group.of(part, weights, inside, edges)

    assert torch.equal(group.chosen, inside.nonzero()[:, 0])
    for block, (start, stop) in zip(group.blocks, pairwise(edges), strict=True):
        where = inside[start:stop]
        assert torch.equal(block.rows, part[:, start:stop])
        assert torch.equal(block.pruned, weights[start:stop].masked_fill(where, 0))
        assert torch.equal(block.places, where.nonzero()[:, 0])
        assert torch.equal(block.kept, weights[start:stop][where])
        block.found.copy_(block.kept)
    assert torch.equal(group.found, weights[inside])
