"""Bounds of all distances: they hold, and the true neighbours are always among the candidates."""

import pytest
import torch
from point_clouds import normal

from vlp_plugins.dimension import neighbours as bounds_module
from vlp_plugins.dimension.neighbours import (
    DistanceBounds,
    centred_gram,
    product_error,
    squared_distances,
)


def all_squared(points):
    points = points.double()
    return (points[:, None] - points[None]).square().sum(-1)


def clouds():
    spread = normal(60, 3000)
    yield "spread", spread
    yield "offset", spread + 1e3
    yield "flat", normal(60, 2) @ normal(2, 3000, seed=1)
    yield "lengths", spread * torch.logspace(-3, 3, 60)[:, None]
    yield "clusters", spread[:6].repeat_interleave(10, 0) + 1e-3 * normal(60, 3000, seed=2)
    yield "duplicates", spread[:20].repeat(3, 1)
    yield "one far", torch.cat([spread[:59], spread[59:] + 1e4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "points"), [*clouds()])
def test_bounds_hold_and_candidates_include_the_true_neighbours(name, points, dtype):
    true = all_squared(points).fill_diagonal_(torch.inf)
    everything = torch.arange(60)[None]

    bounds = DistanceBounds(centred_gram(points, dtype), product_error(points, dtype))

    assert (bounds.lower <= true).all()
    assert (true <= bounds.upper).all()
    candidates = {tuple(pair) for pair in bounds.missing([everything], 60).tolist()}
    for i, nearest in enumerate(true.topk(2, largest=False).indices.tolist()):
        limit = true[i, nearest[1]]
        for j in nearest:
            ties = (true[i] == limit).sum() > 1 and true[i, j] == limit
            assert (min(i, j), max(i, j)) in candidates or ties


def test_float64_tightens_what_float32_leaves_open():
    points = dict(clouds())["clusters"]
    everything = torch.arange(60)[None]

    pairs = [
        len(
            DistanceBounds(centred_gram(points, t), product_error(points, t)).missing(
                [everything], 60
            )
        )
        for t in (torch.float32, torch.float64)
    ]

    assert pairs[1] <= 2 * 60 < pairs[0]


def test_measured_pairs_are_certain():
    points = normal(30, 40)
    everything = torch.arange(30)[None]
    bounds = DistanceBounds(centred_gram(points), product_error(points, torch.float32))

    pairs = bounds.missing([everything], 30)
    bounds.record(pairs, squared_distances(points, pairs))

    assert len(bounds.missing([everything], 30)) == 0
    one, other = pairs.unbind(1)
    assert torch.equal(bounds.lower[one, other], bounds.upper[other, one])
    near = bounds.nearest_two(everything)
    assert torch.equal(near.first[0], all_squared(points).fill_diagonal_(torch.inf).argmin(1))


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    points = normal(50, 40)
    blocks = [
        torch.arange(50)[None],
        torch.randperm(50, generator=torch.Generator().manual_seed(0)).view(2, 25),
    ]
    found = []
    for tile in (1 << 19, 120):
        monkeypatch.setattr(bounds_module, "_TILE", tile)
        bounds = DistanceBounds(centred_gram(points), product_error(points, torch.float32))
        pairs = bounds.missing(blocks, 3)
        bounds.record(pairs, squared_distances(points, pairs))
        found.append((pairs, *(bounds.nearest_two(block).r2 for block in blocks)))

    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.fixture
def precisions():
    """Sets the precision of products by the older switch or the newer one; as before afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    older = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision, lambda value: setattr(matmul, "fp32_precision", value)
    torch.set_float32_matmul_precision(older)
    matmul.fp32_precision = before


def test_reduced_precision_of_products_widens_the_bounds(precisions):
    points = normal(10, 40)
    for switch, values in zip(
        precisions, (("highest", "high", "medium"), ("ieee", "tf32", "bf16")), strict=True
    ):
        errors = []
        for value in values:
            switch(value)
            errors.append(product_error(points, torch.float32))
        assert errors[0] < 1e-4 < errors[1] < errors[2]


@pytest.mark.parametrize("n", [5, 64, 150])
def test_products_are_symmetric_and_centred(n):
    points = normal(n, 1500) + 100

    gram = centred_gram(points)

    centred = points.double() - points.double().mean(0)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, centred @ centred.T, rtol=0, atol=0.05)
