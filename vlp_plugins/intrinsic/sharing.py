"""How far the ratios of neighbouring points repeat one another."""

from __future__ import annotations

import torch

from vlp_plugins.intrinsic.bounds import Neighbours

_ROWS = 512


def inflation(influence: torch.Tensor, neighbours: Neighbours) -> float:
    """By what factor shared points raise the variance of a mean over all points.

    The ratio of a point is made of itself and its two nearest neighbours; ratios that have one of
    these points in common are not independent. The variance counts the products of their
    influences too, as the standard errors of regressions on networks do; it is never taken to be
    below that of independent ratios.

    Args:
        influence: float64 `[n]`, sum 0; 0 for a point without a ratio.
        neighbours: of all points, as one block.

    Returns:
        At least 1.
    """
    alone = float(influence.square().sum())
    if alone == 0:
        return 1.0
    n = len(influence)
    itself = torch.arange(n, device=influence.device)
    made_of = torch.stack([itself, neighbours.first[0], neighbours.second[0]])
    member = torch.zeros((n, n), dtype=torch.bool, device=influence.device)
    member[itself, made_of] = True
    together = 0.0
    for rows in itself.split(_ROWS):
        shared = member[rows][:, made_of[0]]
        for column in made_of[1:]:
            shared |= member[rows][:, column]
        together += float(influence[rows] @ (shared.to(influence.dtype) @ influence))
    return max(1.0, together / alone)
