"""The dual systems of many blocks: their solutions, and what the blocks add to F of everything."""

from __future__ import annotations

import torch

from vlp_plugins.errors import NonFiniteError, UnsupportedError
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


def visibly_rounded(
    solutions: torch.Tensor, squares: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Whether float32 would round A_S' u visibly beside v_S, because u is long.

    Args:
        solutions: u, float64 `[b, n]`.
        squares: the sums of the squares of every A_S `[b]`.
        lengths: |v_S| `[b]`.

    Returns:
        bool `[b]`.
    """
    rounding = 2.0**-24 * solutions.norm(dim=1) * squares.sqrt()
    return ~(rounding < _VISIBLE * lengths)


def refit(
    columns: torch.Tensor, weights: torch.Tensor, solution: torch.Tensor, *, exact: bool
) -> torch.Tensor:
    """v_S + A_S' u.

    Args:
        columns: A_S `[n, k]`.
        weights: v_S `[k]`.
        solution: u, float64 `[n]`.
        exact: whether to compute in float64; see `visibly_rounded`.

    Returns:
        float32 `[k]`.
    """
    wide = columns.double() if exact else widened(columns)
    return torch.addmv(weights.to(wide.dtype), wide.mT, solution.to(wide.dtype)).float()


def block_sums(
    solutions: torch.Tensor, targets: torch.Tensor, ridge: float, first_order: float
) -> torch.Tensor:
    """What every block adds to A (w - v) `[n]`, and to |w_S - v_S|^2, at its minimiser.

    Args:
        solutions: u `[b, n]`, float64.
        targets: q `[b, n]`, float64.
        ridge: r = n lambda.
        first_order: c.

    Returns:
        float64 `[b, n + 1]`.
    """
    moved = -(ridge * solutions + first_order)
    distance = (targets * solutions).sum(1) - ridge * solutions.square().sum(1)
    return torch.cat((moved, distance[:, None]), 1)
