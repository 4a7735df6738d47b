"""What ratios of neighbouring points have in common, against a loop over all pairs of points."""

import pytest
import torch
from point_clouds import normal

from vlp_plugins.dimension import twonn as sharing
from vlp_plugins.dimension.neighbours import Neighbours, nearest_in_blocks
from vlp_plugins.dimension.twonn import inflation


def cloud(n=60):
    (found,) = nearest_in_blocks(normal(n, 3), [torch.arange(n)[None]])
    influence = normal(n, 1, seed=5).double().flatten()
    return influence - influence.mean(), found


def naive(influence, found):
    made_of = [{i, int(found.first[0, i]), int(found.second[0, i])} for i in range(len(influence))]
    together = sum(
        float(influence[i] * influence[j])
        for i, one in enumerate(made_of)
        for j, other in enumerate(made_of)
        if one & other
    )
    return together / float(influence.square().sum())


@pytest.mark.parametrize("rows", [512, 7])
def test_pairs_with_a_point_in_common_are_counted(rows, monkeypatch):
    monkeypatch.setattr(sharing, "_ROWS", rows)
    influence, found = cloud()
    near = influence[found.first[0]]
    alike = influence + near + influence[found.second[0]]  # neighbours move the same way
    alike -= alike.mean()

    assert inflation(alike, found) == pytest.approx(naive(alike, found), rel=1e-12)
    assert inflation(alike, found) > 1.5


def test_it_is_never_below_independent_ratios():
    pairs = torch.arange(20).view(10, 2)
    first = pairs.flip(1).reshape(1, 20)
    second = (first + 2) % 20
    found = Neighbours(torch.ones(1, 20), torch.ones(1, 20), first, second)
    opposite = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10)

    assert naive(opposite, found) < 1
    assert inflation(opposite, found) == 1
    assert inflation(torch.zeros(20, dtype=torch.float64), found) == 1
