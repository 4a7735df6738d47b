"""SparseGPT (Frantar & Alistarh, ICML 2023): column by column, errors passed on to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlp_plugins.methods.reconstruction.layer import (
    Largest,
    Layer,
    Reconstructed,
    Solver,
    check_damping,
    cholesky,
)
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.selection import RowSelection, Selection

BLOCK = 128
DAMPING = 0.01
_STEP = 16


@dataclass(frozen=True)
class SparseGpt(Solver):
    """SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, pass errors on.

    With `walk="model"` the Gram matrix is that of the inputs in the dense model, with
    `walk="blocks"` that of the inputs behind pruned blocks; the published code prunes the layers of
    a language model one after another.

    Inputs are gone through from left to right in blocks. In a block the elements go whose removal
    costs least at the weights as they are then, w^2 / [U_jj]^2 with H^-1 = U'U; every column's
    error is made up for by the columns to its right.

    Attributes:
        damping: added to the diagonal of the Gram matrix H, in means of it.
        block: columns whose elements compete.
        published: as the published code: the threshold of a block takes one element more
            (sparsegpt-G2), and columns whose inputs are all zero use up the budget (sparsegpt-S1).
            Otherwise counts are exact, and such columns are pruned as a usual one.
    """

    name: ClassVar[str] = "sparsegpt"
    internal: ClassVar[tuple[str, ...]] = ("published",)

    damping: float = DAMPING
    block: int = BLOCK
    published: bool = False

    def __post_init__(self) -> None:
        check_damping(damping=self.damping)
        if type(self.block) is not int or self.block < 1:
            raise UnsupportedError(f"block={self.block!r}; give a whole number from 1 on")

    def as_published(self) -> Solver | None:
        return replace(self, published=True)

    def solve(
        self, layer: Layer, scores: torch.Tensor, selections: Sequence[Selection]
    ) -> list[Reconstructed]:
        dead = layer.gram.diagonal() == 0
        lower = cholesky(lambda dtype: self._damped(layer.gram, dead, dtype))
        return [self._pruned(layer.weight, lower, dead, selection) for selection in selections]

    def _damped(self, gram: torch.Tensor, dead: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """J H J with damping, for the reversal J.

        With J H J = L L' and the upper R = J L J, H = R R' and U = R^-1.
        """
        gram = gram.flip(0, 1).to(dtype)
        squares, dead = gram.diagonal(), dead.flip(0)
        # Published: 1 before the mean is taken. That depends on the scale of H, which is free.
        usual = 1.0 if self.published else float(squares[~dead].mean())
        squares.masked_fill_(dead, usual)
        squares.add_(self.damping * squares.mean())
        return gram

    def _pruned(
        self, dense: torch.Tensor, lower: torch.Tensor, dead: torch.Tensor, selection: Selection
    ) -> Reconstructed:
        # U as a whole is not needed: if D is by how much columns were changed so far, their errors
        # are E = D R, and what they leave of the next block is W + D R U, with that block's own U.
        # All of it transposed, so that a column is one piece of memory.
        weight = dense.float().T.contiguous()
        if self.published:
            weight[dead] = 0
        change, support = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
        columns, of = len(weight), getattr(selection, "of", 1)
        width = max(of, self.block // of * of)
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            upper = lower[columns - stop :, columns - stop : columns - start].flip(0, 1)
            identity = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
            factor = torch.linalg.solve_triangular(upper[start:], identity, upper=True).float()
            block, kept, now = weight[start:stop], support[start:stop], change[start:stop]
            now.copy_(block)
            block.addmm_(factor.T, upper[:start].float().T @ change[:start])
            if of == 1:
                cost = (block / factor.diagonal()[:, None]).square_()
                kept.copy_(self._kept(cost.T, selection, start / columns, stop / columns).T)
            self._sweep(block, kept, factor, selection)
            now.sub_(block)
        return support.T.contiguous(), weight.T.contiguous()

    def _sweep(
        self, block: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, selection: Selection
    ) -> None:
        """Prunes a block `[columns, out]` in place from top to bottom.

        Args:
            block: weights as the columns before left them.
            kept: what stays, of that shape; of a pattern it is found here.
            factor: U of the block.
            selection: the rule.
        """
        of, columns = getattr(selection, "of", 1), len(block)
        step = max(of, _STEP // of * of)
        scales = factor.diagonal().reciprocal()[:, None]
        gone = torch.empty_like(block) if of > 1 else ~kept * scales
        for first in range(0, columns, step):
            last = min(first + step, columns)
            errors = torch.empty_like(block[first:last])
            for j in range(first, last):
                if of > 1 and j % of == 0:
                    group = slice(j, j + of)
                    costs = (block[group] * scales[group]).square_()
                    kept[group] = selection.mask(costs.T).T
                    torch.mul(~kept[group], scales[group], out=gone[group])
                error = torch.mul(block[j], gone[j], out=errors[j - first])
                block[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            block[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
        block.masked_fill_(~kept, 0)

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
