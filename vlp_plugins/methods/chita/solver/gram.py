"""Columns of rows, their Gram matrices and their systems."""

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


def gram(columns: torch.Tensor, ridge: float, squares: torch.Tensor | None = None) -> torch.Tensor:
    """`columns @ columns.T` in float64, exact enough to be factorised with `ridge` on its diagonal.

    Products run in float32, summed in float64 over chunks of columns. Where their rounding errors
    may exceed a ten thousandth of the ridge, the product is computed in float64. An error of that
    share changes the solution and what the dual says of its objective to first order, and the
    objective itself to second order only.

    Args:
        columns: `[n, k]` or, for many matrices at once, `[b, n, k]`; float32 or float64.
        ridge: what will be added to the diagonal, above 0.
        squares: of all columns, summed, of no dimension or `[b]`, where they are known: a product
            that will not do is not made then.

    Returns:
        float64 `[n, n]` or `[b, n, n]`.
    """
    if squares is not None and _inexact(columns, squares, ridge):
        columns = columns.double()
    chunks = columns.split(_WIDTH, dim=-1) if columns.shape[-1] > _WIDTH else (columns,)
    products = (_product(chunk, ridge) for chunk in chunks)
    total = next(products)
    for product in products:
        total += product
    return total


def _product(columns: torch.Tensor, ridge: float) -> torch.Tensor:
    product = symmetric(columns)
    if _inexact(product, product.diagonal(dim1=-2, dim2=-1).sum(-1), ridge):
        product = symmetric(columns.double())
    return product.double()


def symmetric(columns: torch.Tensor) -> torch.Tensor:
    """`columns @ columns.mT`, without computing both halves where that saves time.

    Args:
        columns: `[n, k]` or `[b, n, k]`.
    """
    if columns.device.type == "cpu" and columns.ndim > 2:  # faster than one batched product
        return torch.stack([symmetric(matrix) for matrix in columns])
    if columns.device.type != "cpu" or len(columns) < 2 * _STRIP:
        return columns @ columns.mT
    product = columns.new_empty((len(columns), len(columns)))
    # In narrower strips than these a CPU loses what it saves.
    for start in range(0, len(columns), _STRIP):
        strip = slice(start, start + _STRIP)
        wide = product[strip, : start + _STRIP]
        torch.mm(columns[strip], columns[: start + _STRIP].T, out=wide)
        product[:start, strip] = wide[:, :start].T
    return product


def _inexact(products: torch.Tensor, squares: torch.Tensor, ridge: float) -> bool:
    """Whether rounding may have changed eigenvalues by more than a ten thousandth of the ridge."""
    if products.dtype == torch.float64:
        return False
    unit = 2.0**-9 if float32_product_error(products.device) else 2.0**-24
    return not bool(unit * products.shape[-2] ** -0.5 * squares.amax() < _SHARE * ridge)


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


_VISIBLE = 1e-6


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
    columns: torch.Tensor, weights: torch.Tensor, solution: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """v_S + A_S' u, in float64 where float32 would round it visibly because u is long.

    Args:
        columns: A_S `[n, k]`, or of many blocks `[b, n, k]`.
        weights: v_S `[k]` or `[b, k]`.
        solution: u, float64 `[n]` or `[b, n]`.
        squares: the sum of the squares of A_S, float64, of no dimension or `[b]`.

    Returns:
        float32 `[k]` or `[b, k]`.
    """
    wide = widened(columns)
    rounding = 2.0**-24 * solution.norm(dim=-1) * squares.sqrt()
    if not bool((rounding <= _VISIBLE * weights.norm(dim=-1)).all()):
        weights, wide = weights.double(), wide.double()
    return (weights + (solution.to(wide.dtype)[..., None, :] @ wide)[..., 0, :]).float()
