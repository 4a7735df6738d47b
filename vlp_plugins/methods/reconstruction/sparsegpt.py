"""SparseGPT (Frantar & Alistarh, ICML 2023): column by column, errors passed on to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Reconstructed
from vlp_plugins.scoring.selection import RowSelection, Selection

BLOCK = 128
DAMPING = 0.01


@dataclass(frozen=True)
class SparseGpt:
    """The solver.

    Inputs are gone through from left to right in blocks. In a block the elements go whose removal
    costs least at the weights as they are then, w^2 / [U_jj]^2 with H^-1 = U'U; every column's
    error is made up for by the columns to its right.

    Attributes:
        damping: added to the diagonal of H, in means of it.
        block: columns whose elements are compared.
        published: as the published code: the threshold of a block takes one element more
            (sparsegpt-G2), and columns whose inputs are all zero use up the budget (sparsegpt-S1).
            Otherwise counts are exact, and such columns are pruned as a usual one.
    """

    damping: float = DAMPING
    block: int = BLOCK
    published: bool = False

    def solve(
        self, layer: Layer, scores: torch.Tensor, selections: Sequence[Selection]
    ) -> list[Reconstructed]:
        factor, dead = self._factor(layer)
        return [self._pruned(layer.weight, factor, dead, selection) for selection in selections]

    def _factor(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """U, upper triangular with H^-1 = U'U, and which inputs are all zero."""
        gram = layer.gram.double()
        squares = gram.diagonal()
        dead = squares == 0
        # Published: 1 before the mean is taken. That depends on the scale of H, which is free.
        usual = 1.0 if self.published else float(squares[~dead].mean())
        squares.masked_fill_(dead, usual)
        squares.add_(self.damping * squares.mean())
        # With J the reversal, J H J = L L' gives H = R R' for the upper R = J L J, and U = R^-1:
        # one factorisation and one triangular inverse.
        lower = torch.linalg.cholesky(gram.flip(0, 1))
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        return upper.float(), dead

    def _pruned(
        self, dense: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, selection: Selection
    ) -> Reconstructed:
        weight = dense.float().clone()
        if self.published:
            weight[:, dead] = 0
        support = torch.ones_like(weight, dtype=torch.bool)
        diagonal = factor.diagonal()
        columns, of = weight.shape[1], getattr(selection, "of", 1)
        width = max(of, self.block // of * of)
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            block, inside = weight[:, start:stop], factor[start:stop, start:stop]
            kept = support[:, start:stop]
            if of == 1:
                cost = (block / diagonal[start:stop]).square_()
                kept.copy_(self._kept(cost, selection, start / columns, stop / columns))
            errors = torch.empty_like(block)
            for j in range(stop - start):
                if of > 1 and j % of == 0:
                    group = slice(j, j + of)
                    cost = (block[:, group] / diagonal[start + j : start + j + of]).square_()
                    kept[:, group] = selection.mask(cost)
                column = block[:, j]
                error = column.masked_fill(kept[:, j], 0).div_(inside[j, j])
                column.masked_fill_(~kept[:, j], 0)
                block[:, j + 1 :].addr_(error, inside[j, j + 1 :], alpha=-1)
                errors[:, j] = error
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        return support, weight.masked_fill_(~support, 0)

    def _kept(
        self, cost: torch.Tensor, selection: Selection, begin: float, end: float
    ) -> torch.Tensor:
        """What stays in a block, which reaches from a share of the columns to another."""
        if isinstance(selection, RowSelection):
            each = round(selection.per_row * end) - round(selection.per_row * begin)
            return replace(selection, per_row=each, extra=selection.extra * (end == 1)).mask(cost)
        if self.published:
            place = int(selection.remove * (end - begin))
            return cost > cost.flatten().sort().values[min(place, cost.numel() - 1)]
        return Largest(round(selection.remove * end) - round(selection.remove * begin)).mask(cost)
