"""CHITA by layers: the Gram matrix and the gradients of every batch in one problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.methods.chita.settings import DEFAULT_GRADIENT_WEIGHT, ROW_DTYPES, Settings
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Layer, Scaled, Solver
from vlp_plugins.runtime.errors import UnsupportedError

_ELEMENTS = 1 << 20
"""Of the rows of some outputs that are worked on together: next to nothing, in `layer_bytes`."""


@dataclass(frozen=True)
class LayerChita(Alps):
    """The quadratic model of the loss of CHITA, one layer at a time, joined to its reconstruction.

    For row i of the weights w the solver minimises (w - v)' M_i (w - v) over sparse v, with

        M_i = (1 - t) H + t sum_b g_bi g_bi'

    H the Gram matrix of the inputs behind pruned blocks, g_bi row i of the gradient of the loss of
    batch b by the dense weights. The second term is the empirical Fisher information of CHITA
    (Benbaki et al., ICML 2023) with a row of the weights for a block; it says what H does not know,
    how much the loss depends on each output. Joining the two is the direction of MOONSHOT (Afriat
    et al., 2026); both are brought to a mean diagonal of 1 in coordinates where all inputs have the
    same norm, and t is chosen by measurement. The splitting of ALPS minimises it: M_i + rho I is
    one eigendecomposition of H for all rows, and a correction of rank n by Woodbury's formula.

    Attributes:
        gradient_weight: t, from 0 on, below 1; 0 is ALPS, and takes no gradients.
        rows: batches to take gradients of, at most, the first ones; None: all.
        row_dtype: `float32` or `bfloat16`.
    """

    name: ClassVar[str] = "chita"
    internal: ClassVar[tuple[str, ...]] = ("damping", *Alps.internal)

    gradient_weight: float = DEFAULT_GRADIENT_WEIGHT
    rows: int | None = None
    row_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.gradient_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1:
            raise UnsupportedError(
                f"gradient_weight={weight!r}; give a number from 0 (the Gram matrix alone) on, "
                "below 1"
            )
        Settings(rows=self.rows, row_dtype=self.row_dtype)  # refuses what is none

    @property
    def gradients(self) -> GradientRows | None:
        if not self.gradient_weight:
            return None
        narrow = "" if self.row_dtype == "bfloat16" else ", keep them in row_dtype='bfloat16'"
        return GradientRows(
            self.rows,
            ROW_DTYPES[self.row_dtype],
            instead="gradient_weight=0 takes the Gram matrix alone",
            smaller=f"take fewer (rows){narrow}",
        )

    def as_published(self) -> Solver | None:
        return None

    def scaled(self, layer: Layer) -> Scaled:
        scaled = super().scaled(layer)
        if layer.rows is None:
            return scaled
        return Joint.of(scaled, layer.rows, self.gradient_weight)


@dataclass(frozen=True)
class Joint(Scaled):
    """A layer whose rows have quadratic forms M_i of their own, in coordinates of unit diagonals.

    Attributes:
        share: of the Gram matrix in M_i, float32 `[out, 1]`.
        rows: of the gradients, scaled by the root of their weight, float32 `[out, n, in]`.
        values: eigenvalues of the Gram matrix, float32 `[in]`.
        vectors: its eigenvectors, float32 `[in, in]`, in columns.
        turned: the rows in the basis of these, float32 `[out, n, in]`.
    """

    share: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor
    turned: torch.Tensor

    @classmethod
    def of(cls, scaled: Scaled, gradients: torch.Tensor, weight: float) -> Joint:
        """Joins gradients `[n, out, in]`, in the original coordinates, with a weight in [0, 1)."""
        values, vectors = torch.linalg.eigh(scaled.gram.double())
        values, vectors = values.clamp_min(0).float(), vectors.float()
        # All in the place of one copy, in which a row of the weights has its rows together.
        rows = gradients.transpose(0, 1).to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        rows.div_(scaled.norms)
        own = torch.linalg.vector_norm(rows, dim=1).square().mean(1, keepdim=True)
        mean = float(own.mean())
        # The loss may not depend on the layer at all.
        scale = weight / mean if mean > 0 else 1.0
        squares = (1 - weight) + own * scale
        sizes = squares.sqrt()
        rows.mul_((scale**0.5 / sizes)[:, :, None])
        return cls(
            scaled.gram,
            scaled.weight * sizes,
            scaled.norms * sizes,
            (1 - weight) / squares,
            rows,
            values,
            vectors,
            rows @ vectors,
        )

    @property
    def parts(self) -> list[slice]:
        return [slice(None)]  # each row has gradients of its own

    def product(self, values: torch.Tensor) -> torch.Tensor:
        along = torch.bmm(self.rows, values[:, :, None])
        return torch.addcmul(torch.bmm(along.mT, self.rows)[:, 0], self.share, values @ self.gram)

    def shifted(self, rho: float) -> Callable[[torch.Tensor], torch.Tensor]:
        diagonal = self.share * self.values + rho
        factor = self._factor(diagonal)

        def solve(values: torch.Tensor) -> torch.Tensor:
            found = (values @ self.vectors).div_(diagonal)
            along = torch.cholesky_solve(torch.bmm(self.turned, found[:, :, None]), factor)
            found.sub_(torch.bmm(along.mT, self.turned)[:, 0].div_(diagonal))
            return found @ self.vectors.T

        return solve

    def _factor(self, diagonal: torch.Tensor) -> torch.Tensor:
        """The Cholesky factors of I + R D^-1 R' of every row, R the turned rows of the gradients.

        In float64 where rounding leaves one not positive definite: equal batches give equal rows.
        """
        outputs, n, inputs = self.turned.shape
        step = max(1, _ELEMENTS // (n * inputs))
        for dtype in (torch.float32, torch.float64):
            inner = torch.eye(n, dtype=dtype, device=diagonal.device).repeat(outputs, 1, 1)
            failed = torch.empty(outputs, dtype=torch.int32, device=diagonal.device)
            for first in range(0, outputs, step):
                turned = self.turned[first : first + step].to(dtype)
                over = turned / diagonal[first : first + step, None]
                inner[first : first + step].baddbmm_(over, turned.mT)
            factor = inner.mT  # in its place: as LAPACK has it, column by column
            torch.linalg.cholesky_ex(factor, out=(factor, failed))
            if not bool(failed.any()):
                return factor.float()
            del inner, factor  # before the next ones are made
        raise UnsupportedError(
            "the gradients of a layer differ too much in size for its joint problem; give a "
            "smaller gradient_weight"
        )
