"""The dimension that a sample of log ratios tells, and how much each of them moves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.intrinsic.estimate import Estimator


@dataclass(frozen=True, slots=True)
class DimensionFit:
    """A dimension fitted to ratios.

    Attributes:
        dimension: intrinsic dimension.
        kept: ratios that entered the fit.
        influence: float64 `[N]`, in the order of the ratios: a change of the share of ratio i in
            the sample by s changes the dimension by s times its influence, to first order
            (Hampel's influence function at the sample).
    """

    dimension: float
    kept: int
    influence: torch.Tensor


def fit_dimension(logs: torch.Tensor, estimator: Estimator) -> DimensionFit:
    """The fit that the estimator names.

    Args:
        logs: float64 `[N]`, the logarithms of r2 / r1, all above 0; at least 4.
        estimator: its `fit` and `drop`.
    """
    fit = slope if estimator.fit == "slope" else likelihood
    return fit(logs, estimator.drop)


def slope(logs: torch.Tensor, drop: float | None = None) -> DimensionFit:
    """The slope of -log(1 - F) on the sorted log ratios, through the origin (Facco et al. 2017).

    The i-th of N sorted ratios has F = i / N. The last has no finite -log(1 - F) and is never part
    of the fit.

    Args:
        logs: float64 `[N]`.
        drop: fraction of the largest ratios left out; None leaves out the last two.
    """
    n = len(logs)
    kept = n - 2 if drop is None else min(_kept(n, drop), n - 1)
    x, order = logs.sort()
    heights = -torch.log1p(-torch.arange(1, n, dtype=x.dtype, device=x.device) / n)
    x_kept, y_kept = x[:kept], heights[:kept]
    products, squares = x_kept @ y_kept, x_kept @ x_kept
    dimension = products / squares
    # Products and squares are L-statistics: their influences rise with x by -log(1 - F) and 2x,
    # and no more beyond the last that is kept. F is taken in the middle of each step.
    middle = -torch.log1p(-(torch.arange(kept, dtype=x.dtype, device=x.device) + 0.5) / n)
    rises = torch.zeros_like(x)
    rises[:kept] = torch.diff(x_kept, prepend=x.new_zeros(1)) * middle
    of_products, of_squares = rises.cumsum(0), x.clamp_max(x[kept - 1]).square()
    influence = of_products - of_products.mean() - dimension * (of_squares - of_squares.mean())
    influence *= n / squares
    return DimensionFit(float(dimension), kept, torch.empty_like(x).scatter_(0, order, influence))


def likelihood(logs: torch.Tensor, drop: float | None = None) -> DimensionFit:
    """Maximum likelihood for exponentially distributed log ratios, made unbiased.

    (N - 1) / sum(log ratios) (Denti et al. 2022). Where the largest are left out, each is known to
    be at least as large as the largest that is kept: the likelihood of a censored sample.

    Args:
        logs: float64 `[N]`.
        drop: fraction of the largest ratios left out; None for none.
    """
    n = len(logs)
    kept = _kept(n, drop or 0.0)
    limit = logs.kthvalue(kept).values
    times = logs.clamp_max(limit)
    dimension = (kept - 1) / times.sum()
    # Of the censored sample by the hazard of the exponential distribution, which is its dimension.
    rate = kept / times.sum()
    counted = (logs <= limit).double()
    influence = dimension * (n / kept) * (counted - rate * times)
    return DimensionFit(float(dimension), kept, influence)


def _kept(n: int, drop: float) -> int:
    return n - round(drop * n)
