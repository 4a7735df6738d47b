"""Columns of rows, their Gram matrices, and the dual systems of many blocks."""

from __future__ import annotations

import torch

from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.runtime.model_state import float32_product_error

_WIDTH = 1 << 14
_STRIP = 64
_SHARE = 1e-4


def pick_columns(part: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Some columns of a matrix, contiguous and at least float32.

    Args:
        part: `[n, m]`, floating, strided.
        chosen: int64 `[k]`, positions of columns.

    Returns:
        `[n, k]` in the dtype of `part`, float32 for a smaller one.
    """
    # On a CPU twice as fast as index_select, which does not expect rows far apart.
    return widened(torch.gather(part, 1, chosen.expand(len(part), -1)))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, in float32 if it is of a smaller floating dtype."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


def gram(columns: torch.Tensor, ridge: float) -> torch.Tensor:
    """`columns @ columns.T` in float64, exact enough to be factorised with `ridge` on its diagonal.

    Products run in float32, summed in float64 over chunks of columns. Where their rounding errors
    may exceed a ten thousandth of the ridge, the product is computed in float64. An error of that
    share changes the solution and what the dual says of its objective to first order, and the
    objective itself to second order only.

    Args:
        columns: `[n, k]` or, for many matrices at once, `[b, n, k]`; float32 or float64.
        ridge: what will be added to the diagonal, above 0.

    Returns:
        float64 `[n, n]` or `[b, n, n]`.
    """
    chunks = columns.split(_WIDTH, dim=-1) if columns.shape[-1] > _WIDTH else (columns,)
    products = (_product(chunk, ridge) for chunk in chunks)
    total = next(products)
    for product in products:
        total += product
    return total


def _product(columns: torch.Tensor, ridge: float) -> torch.Tensor:
    product = symmetric(columns)
    if inexact(product, ridge).any():
        product = symmetric(columns.double())
    return product.double()


def symmetric(columns: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`columns @ columns.T`, without computing both halves where that saves time.

    Args:
        columns: `[n, k]` or `[b, n, k]`.
        out: where to write the product of one matrix, `[n, n]`.
    """
    if columns.device.type != "cpu" or columns.ndim > 2 or len(columns) < 2 * _STRIP:
        return torch.matmul(columns, columns.mT, out=out)
    product = columns.new_empty((len(columns), len(columns))) if out is None else out
    # In narrower strips than these a CPU loses what it saves.
    for start in range(0, len(columns), _STRIP):
        strip = slice(start, start + _STRIP)
        wide = product[strip, : start + _STRIP]
        torch.mm(columns[strip], columns[: start + _STRIP].T, out=wide)
        product[:start, strip] = wide[:, :start].T
    return product


def inexact(products: torch.Tensor, ridge: float) -> torch.Tensor:
    """Whether rounding may have changed eigenvalues by more than a ten thousandth of the ridge.

    Args:
        products: Gram matrices `[n, n]` or `[b, n, n]` as float32 or float64 gave them.
        ridge: what will be added to the diagonal.

    Returns:
        bool, of no dimension or `[b]`.
    """
    traces = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    unit = 2.0**-9 if float32_product_error(products.device) else 2.0**-24
    if products.dtype == torch.float64:
        unit = 0.0
    return ~(unit * products.shape[-1] ** -0.5 * traces < _SHARE * ridge)


def weighted_sum(part: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """`part @ vector`, summed in float64 over chunks of columns; exact where the vector is float64.

    Args:
        part: `[n, m]`, floating.
        vector: `[m]`, or several as `[m, s]`, floating.

    Returns:
        float64 `[n]` or `[n, s]`.
    """
    if part.shape[1] <= _WIDTH:
        dtype = torch.promote_types(widened(part[:0]).dtype, vector.dtype)
        return (part.to(dtype) @ vector.to(dtype)).double()
    total = part.new_zeros((len(part), *vector.shape[1:]), dtype=torch.float64)
    for chunk, piece in zip(part.split(_WIDTH, dim=1), vector.split(_WIDTH), strict=True):
        total += weighted_sum(chunk, piece)
    return total


def pick_and_sum(
    part: torch.Tensor,
    chosen: torch.Tensor,
    vector: torch.Tensor,
    picked: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Writes `part[:, chosen]` and `part @ vector`, reading the part once.

    A few rows at a time are summed and then picked from, while they are in the cache.

    Args:
        part: `[n, m]`, float32 or float64.
        chosen: int64 `[k]`.
        vector: `[m]`.
        picked: `[n, k]`, for the columns.
        total: `[n]`, for the sums; all of one dtype.
    """
    places = chosen.expand(_STRIP, -1)
    for start in range(0, len(part), _STRIP):
        rows = part[start : start + _STRIP]
        torch.mv(rows, vector, out=total[start : start + _STRIP])
        torch.gather(rows, 1, places[: len(rows)], out=picked[start : start + _STRIP])


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
