"""The dual systems of many blocks: their solutions, and what the blocks add to F of everything."""

from __future__ import annotations

import torch

from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.solvers.columns import widened

_VISIBLE = 1e-6


def solve_systems(grams: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """U = (r I + A_S A_S')^-1 q of every block by Cholesky.

    Args:
        grams: A_S A_S', float64 `[b, n, n]`; r is added in place.
        targets: q, float64 `[b, n]`.
        ridge: r = n lambda.

    Returns:
        float64 `[b, n]`.
    """
    grams.diagonal(dim1=1, dim2=2).add_(ridge)
    return torch.cholesky_solve(targets[..., None], factor(grams))[..., 0]


def factor(matrices: torch.Tensor) -> torch.Tensor:
    """Lower triangular Cholesky factors of r I + A A'.

    Args:
        matrices: float64 `[n, n]` or `[b, n, n]`.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
        UnsupportedError: if r is lost among the rounding errors of the products.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if not bool(failed.any()):
        return factors
    check_finite(matrices)
    raise UnsupportedError(
        "the ridge penalty lambda is too small for rows of this size: float64 cannot tell it from "
        "rounding errors; give a larger one, or lambda=auto"
    )


def check_finite(found: torch.Tensor) -> None:
    """Raises `NonFiniteError` unless all that was computed from the rows is finite."""
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(
            "the rows of the problem hold NaN or infinity; leave out batches with such gradients"
        )


def refit(
    columns: torch.Tensor, weights: torch.Tensor, solution: torch.Tensor, squares: float
) -> torch.Tensor:
    """v_S + A_S' u, in float64 where float32 would round it visibly because u is long.

    Args:
        columns: A_S `[n, k]`.
        weights: v_S `[k]`.
        solution: u, float64 `[n]`.
        squares: the sum of the squares of A_S.

    Returns:
        float32 `[k]`.
    """
    wide = widened(columns)
    rounding = 2.0**-24 * float(solution.norm()) * squares**0.5
    if rounding < _VISIBLE * float(weights.norm()):
        return weights + (solution.to(wide.dtype) @ wide).float()
    return (weights.double() + solution @ wide.double()).float()


def block_sums(
    solutions: torch.Tensor, targets: torch.Tensor, ridge: float, first_order: float
) -> torch.Tensor:
    """What blocks add to A (w - v) `[n]`, and to |w_S - v_S|^2, at their minimisers.

    Args:
        solutions: u `[b, n]`, float64.
        targets: q `[b, n]`, float64.
        ridge: r = n lambda.
        first_order: c.

    Returns:
        float64 `[n + 1]`.
    """
    moved = -(ridge * solutions + first_order).sum(0)
    distance = (targets * solutions).sum() - ridge * solutions.square().sum()
    return torch.cat((moved, distance[None]))
