"""The problem on a fixed support, solved through its n x n dual, and the Gram matrices for it.

For a support S with complement C, r = n ridge and c = first_order let

    M = r I + A_S A_S',   q = A_C v_C - c 1,   u = M^-1 q.

Then w_S = v_S + A_S' u is the minimiser and

    F_S = r/2 (q'u + |v_C|^2) + c 1'A v - n c^2/2

is F there. Nothing divides by lambda. With z = v + A'u and h_j = a_j' M^-1 a_j, removing j from S
costs r/2 z_j^2 / (1 - h_j) exactly, and adding j of C gains r/2 z_j^2 / (1 + h_j).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vlp_plugins.methods.chita.solver.problem import Problem, Ranked
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.runtime.model_state import float32_product_error

_WIDTH = 1 << 14  # columns in work at a time
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


@dataclass(frozen=True)
class Band:
    """Some columns of the rows, with what a search among them needs.

    Attributes:
        columns: `[n, m]`, float64.
        weights: their dense weights, float64 `[m]`.
    """

    columns: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Dual:
    """The dual of one support; all tensors float64.

    Attributes:
        matrix: M `[n, n]`.
        target: q `[n]`.
        ridge: r = n lambda.
        pruned: |v_C|^2.
        first_order: c.
        dense: 1'A v; left out (0) where c is 0.
    """

    matrix: torch.Tensor
    target: torch.Tensor
    ridge: float
    pruned: float
    first_order: float = 0.0
    dense: float = 0.0

    @classmethod
    def of(
        cls,
        problem: Problem,
        support: torch.Tensor,
        each: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Dual:
        """The dual of a support of the full problem; one sweep over the rows.

        Args:
            problem: see `Problem`; its blocks play no part.
            support: bool `[p]`.
            each: called with every part of the rows, as `Rows.parts` yields it.
        """
        rows, c = problem.rows, problem.first_order
        ridge = rows.n * problem.ridge
        matrix = problem.weights.new_zeros((rows.n, rows.n), dtype=torch.float64)
        sums = problem.weights.new_zeros(rows.n + 2, dtype=torch.float64)  # A_C v_C, |v_C|^2, 1'A v
        for start, part in rows.parts():
            if each is not None:
                each(start, part)
            columns = slice(start, start + part.shape[1])
            inside, weights = support[columns], problem.weights[columns].double()
            tolerable = ridge * (part.shape[1] / rows.p) ** 0.5  # errors of parts add up
            for chosen in inside.nonzero()[:, 0].split(_WIDTH):
                matrix += gram(pick_columns(part, chosen), tolerable)
            pruned = weights.masked_fill(inside, 0)
            sums[:-2] += weighted_sum(part, pruned)
            sums[-2] += pruned.square().sum()
            if c:
                sums[-1] += weighted_sum(part, weights).sum()
        matrix, sums = rows.add_up(matrix), rows.add_up(sums)
        check_finite(sums)
        matrix.diagonal().add_(ridge)
        square, dense = sums[-2:].tolist()
        return cls(matrix, sums[:-2] - c, ridge, square, c, dense)

    @cached_property
    def factor(self) -> torch.Tensor:
        """Lower triangular L with M = L L'."""
        return factor(self.matrix)

    @cached_property
    def solution(self) -> torch.Tensor:
        """U = M^-1 q `[n]`."""
        return torch.cholesky_solve(self.target[:, None], self.factor)[:, 0]

    @cached_property
    def whitener(self) -> torch.Tensor:
        """L^-1 `[n, n]`: h_j is the squared length of L^-1 a_j."""
        identity = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        return torch.linalg.solve_triangular(self.factor, identity, upper=False)

    @property
    def objective(self) -> float:
        """F of the minimiser on the support; no sweep."""
        c = self.first_order
        quadratic = self.ridge / 2 * (float(self.target @ self.solution) + self.pruned)
        return quadratic + c * self.dense - len(self.target) * c**2 / 2

    def values(self, problem: Problem, support: torch.Tensor) -> torch.Tensor:
        """The minimiser, float32 `[p]`; one sweep over the rows."""
        values = torch.zeros_like(problem.weights, dtype=torch.float32)
        for start, part in problem.rows.parts():
            weights = problem.weights[start : start + part.shape[1]]
            inside = support[start : start + part.shape[1]]
            for chosen in inside.nonzero()[:, 0].split(_WIDTH):
                kept = pick_columns(part, chosen)
                values[start + chosen] = self.refit(kept, weights[chosen])
        return problem.rows.fill(values)

    def refit(self, kept: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """v_S + A_S' u for columns of the support `[n, k]` and v there `[k]`; float32 `[k]`."""
        squares = self.matrix.diagonal().sum() - len(self.matrix) * self.ridge
        return refit(kept, weights, self.solution, squares.clamp_min(0))

    def exchanged(self, band: Band, leaving: torch.Tensor, joining: torch.Tensor) -> Dual:
        """The dual after columns of a band left and joined the support, from these alone.

        Args:
            band: columns at hand.
            leaving: int64 `[a]`, positions in the band.
            joining: int64 `[b]`.
        """
        added, removed = band.columns[:, joining], band.columns[:, leaving]
        v_added, v_removed = band.weights[joining], band.weights[leaving]
        return replace(
            self,
            matrix=self.matrix + added @ added.T - removed @ removed.T,
            target=self.target - added @ v_added + removed @ v_removed,
            pruned=max(0.0, self.pruned - float(v_added @ v_added) + float(v_removed @ v_removed)),
        )


def removal_costs(z: torch.Tensor, h: torch.Tensor, ridge: float) -> torch.Tensor:
    """By how much F rises when one weight of the support goes and the others are solved again.

    Args:
        z: `v + A'u` `[m]`, the current weights.
        h: their leverages `[m]`.
        ridge: r = n lambda.
    """
    return z.square() * (ridge / 2) / (1 - h).clamp_min(torch.finfo(h.dtype).eps)


def adding_gains(z: torch.Tensor, h: torch.Tensor, ridge: float) -> torch.Tensor:
    """By how much F falls when one pruned weight joins and all are solved again.

    Args:
        z: `v + A'u` `[m]`.
        h: their leverages `[m]`.
        ridge: r = n lambda.
    """
    return z.square() * (ridge / 2) / (1 + h)


def dual_and_band(problem: Problem, chosen: Ranked) -> tuple[Dual, Band]:
    """The dual of a support and the columns of its band, in the same sweep over the rows."""
    band, device = chosen.band, chosen.band.device
    columns = torch.zeros((problem.rows.n, len(band)), dtype=torch.float64, device=device)

    def collect(start: int, part: torch.Tensor) -> None:
        edges = torch.tensor([start, start + part.shape[1]], device=device)
        first, last = torch.searchsorted(band, edges).tolist()
        columns[:, first:last] = pick_columns(part, band[first:last] - start).double()

    dual = Dual.of(problem, chosen.support, collect)
    return dual, Band(problem.rows.add_up(columns), problem.weights[band].double())
