"""ALPS (Meng et al., NeurIPS 2024): the support and the weights of a layer by splitting (ADMM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlp_plugins.methods.reconstruction.layer import (
    Layer,
    Reconstructed,
    Scaled,
    Solver,
    check_damping,
)
from vlp_plugins.scoring.selection import PatternSelection, Selection

RHO = 0.1
_MOST_ITERATIONS = 300
_EVERY = 3
_MOST_RHO = 1e6
_SETTLED = 3e-4
_LEAST_ITERATIONS = 30


@dataclass(frozen=True)
class Alps(Solver):
    """ALPS (Meng et al., NeurIPS 2024): choose support and weights of a layer by splitting.

    Two copies of the weights, one exact and one sparse, are drawn together.

    B minimises the error and is free; D is the projection of B on what may stay; the penalty rho
    between them grows while the support changes. Published code decomposes H once, in
    float64; here H + rho I is factorised for every rho, which takes less time, in float32.

    Attributes:
        damping: added to the diagonal of the Gram matrix H, in means of it; stays in the objective
            (alps-L1).
        own_damping: the same in the diagonal's own elements.
        growth: what rho is multiplied by while more than 10%, more than 0.5% and fewer of the
            kept elements change.
        refit_steps: conjugate-gradient steps on the support that was found.
        tolerance: of these; 0 makes all steps.
        published: rows may become empty (alps-L2); otherwise each keeps its largest element.
    """

    name: ClassVar[str] = "alps"
    internal: ClassVar[tuple[str, ...]] = (
        "own_damping",
        "growth",
        "refit_steps",
        "tolerance",
        "published",
    )

    damping: float = 0.01
    own_damping: float = 0.0
    growth: tuple[float, float, float] = (1.3, 1.2, 1.1)
    refit_steps: int = 10
    tolerance: float = 0.0
    published: bool = False

    def __post_init__(self) -> None:
        check_damping(damping=self.damping)

    def as_published(self) -> Solver | None:
        return replace(self, published=True)

    def solve(
        self, layer: Layer, scores: torch.Tensor, selections: Sequence[Selection]
    ) -> list[Reconstructed]:
        scaled = self.scaled(layer)
        found = []
        for selection in selections:
            free = self._split(scaled, selection)
            support = selection.mask(self._filled(free.abs(), selection))
            refitted = scaled.refitted(
                support, free, tolerance=self.tolerance, steps=self.refit_steps
            )
            found.append((support, refitted))
        return found

    def scaled(self, layer: Layer) -> Scaled:
        """The layer in the coordinates in which elements are compared, float32."""
        return layer.scaled(self.damping, self.own_damping, torch.float32)

    def _split(self, scaled: Scaled, selection: Selection) -> torch.Tensor:
        """B at the end, in scaled coordinates, float32 `[out, in]`."""
        weight, target = scaled.weight, scaled.product(scaled.weight)
        kept = weight.numel() - selection.remove
        # D is what stays of `moved` = B + V / rho, and V what goes of it, times the rho of then:
        # three tensors of the layer's size in one.
        moved, support, dual = weight.clone(), selection.mask(weight.abs()), 0.0
        before, free = support, torch.empty_like(weight)
        rho, grown, solve = RHO, False, None
        for iteration in range(1, _MOST_ITERATIONS + 1):
            if solve is None:
                solve = scaled.shifted(rho)
            for part in scaled.parts:  # Y - V + rho D
                right = torch.where(support[part], rho, -dual).mul_(moved[part])
                free[part] = solve(right.add_(target[part]))
            moved.masked_fill_(support, 0).mul_(dual / rho).add_(free)
            support, dual = selection.mask(moved.abs()), rho
            if iteration % _EVERY:
                continue
            changed = int((support != before).sum())
            share, before = changed / max(1, kept), support
            if changed == 0 and grown:
                break
            if share > 0.005 or (changed and grown):
                place = 0 if share > 0.1 else 1 if share > 0.005 else 2
                rho, grown = min(rho * self.growth[place], _MOST_RHO), True
            else:
                moved.copy_(weight)
                rho, support, dual = rho / 5, selection.mask(weight.abs()), 0.0
            if iteration > _LEAST_ITERATIONS and share < _SETTLED:
                break
            solve = None  # frees its factor before the next one is made
        return free

    def _filled(self, sizes: torch.Tensor, selection: Selection) -> torch.Tensor:
        """The sizes by which elements stay, with the largest of every row above all others."""
        if self.published or isinstance(selection, PatternSelection):
            return sizes
        places = sizes.argmax(1, keepdim=True)
        return sizes.scatter(1, places, torch.inf) if selection.remove else sizes


@dataclass(frozen=True)
class AlpsPlus(Alps):
    """ALPS with damping by input, a penalty that grows more slowly, and a full refit.

    Of this project, not published. At equal sparsity its error is below that of ALPS on the inputs
    that it saw and on others.

    Attributes:
        damping: added to the diagonal of the Gram matrix, in means of it.
        own_damping: added to the diagonal, in its own elements: noise of that share of the power of
            each input.
    """

    name: ClassVar[str] = "alps+"
    internal: ClassVar[tuple[str, ...]] = ("growth", "refit_steps", "tolerance", "published")

    damping: float = 0.003
    own_damping: float = 0.02
    growth: tuple[float, float, float] = (1.15, 1.1, 1.05)
    refit_steps: int = 20
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_damping(damping=self.damping, own_damping=self.own_damping)

    def as_published(self) -> Solver | None:
        return None
