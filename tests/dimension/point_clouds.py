"""Point clouds of known dimension, and their neighbours by one loop over all pairs in float64."""

import math

import torch


def normal(n, coordinates, seed=0):
    return torch.randn(n, coordinates, generator=torch.Generator().manual_seed(seed))


def torus(n, dimension, generator):
    """Uniform on a flat torus, which has no boundary: `[n, 2 dimension]`."""
    angles = 2 * math.pi * torch.rand(n, dimension, generator=generator)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def naive_nearest_two(points):
    """r1, r2 as lists."""
    points = points.double()
    nearest = []
    for i, point in enumerate(points):
        lengths = (points - point).square().sum(1).sqrt().tolist()
        del lengths[i]
        nearest.append(sorted(lengths)[:2])
    return [r1 for r1, _ in nearest], [r2 for _, r2 in nearest]
