"""Methods that reconstruct every layer: SparseGPT, ALPS, and a refit of any mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlp_plugins.calibration.moments import INPUT_GRAM, InputGram, Statistic
from vlp_plugins.masks.packed import Pruned, pack
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Refit, Solver
from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import UnsupportedError, VlpError
from vlp_plugins.runtime.memory import text_of, usable_bytes
from vlp_plugins.scoring.allocation import LayerAllocation, RowAllocation
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.selection import Selection
from vlp_plugins.scoring.threshold import Cut
from vlp_plugins.scoring.wanda import Wanda


@dataclass(frozen=True)
class Reconstruction(Composition):
    """A composition whose masks, and the values of what stays, a solver chooses layer by layer.

    The allocation says how many elements each layer keeps, by the score; the solver sees the layer
    and the Gram matrix of its inputs. In a walk over the model these are the inputs in the dense
    model, and the Gram matrices of all layers are held at once; in a walk by blocks those behind
    pruned blocks, and the matrices of one block.

    Attributes:
        solver: chooses support and values.
        published_solver: does it as the published code does; None if there is none.
    """

    solver: Solver = field(default_factory=Alps)
    published_solver: Solver | None = None
    changes_weights: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs, InputGram())

    @property
    def relative_cost(self) -> str:
        return "1, and a solver"

    def check(self, context: Context) -> None:
        super().check(context)
        self._solver(context)
        if context.statistics is not None or self.walk_of(context) == "blocks":
            return
        taken = self.statistics_bytes(context.weights)
        free = context.memory_budget or usable_bytes(torch.device("cpu"), 0)
        if taken > free:
            raise UnsupportedError(
                f"method {self.name!r} holds the Gram matrices of all layers, {text_of(taken)}, "
                f"and {text_of(free)} of memory may be used; take another method, such as wanda "
                "or multiflow, or a smaller model"
            )

    def _solver(self, context: Context) -> Solver:
        solver = self.published_solver if context.published else self.solver
        if solver is None:
            raise UnsupportedError(
                f"method {self.name!r} is of this project and has no published variant; leave out "
                "variant='published'"
            )
        return solver

    def reduced(
        self,
        context: Context,
        weight: Weight,
        scores: torch.Tensor,
        selections: Sequence[Selection],
        mean: Callable[[str, str], torch.Tensor],
    ) -> list[Pruned]:
        matrix = weight.matrix.detach().float()
        rules = [Largest(each.remove) if isinstance(each, Cut) else each for each in selections]
        try:
            gram = mean(INPUT_GRAM, weight.name).to(matrix.device).view(matrix.shape[1], -1)
            found = self._solver(context).solve(Layer(matrix, gram), scores, rules)
        except VlpError as error:
            raise type(error)(f"weight {weight.name!r}: {error}") from error
        return [
            Pruned(pack(support.view(weight.shape).cpu()), fitted[support].cpu())
            for support, fitted in found
        ]


def sparsegpt(*, damping: float = 0.01, block: int = 128) -> Reconstruction:
    """SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, pass errors on.

    With `walk="model"` the Gram matrix is that of the inputs in the dense model, with
    `walk="blocks"` that of the inputs behind pruned blocks; the published code prunes the layers of
    a language model one after another.

    Args:
        damping: added to the diagonal of the Gram matrix, in means of it.
        block: columns whose elements compete.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    _check(damping=damping)
    if type(block) is not int or block < 1:
        raise UnsupportedError(f"block={block!r}; give a whole number from 1 on")
    solvers = SparseGpt(damping, block), SparseGpt(damping, block, published=True)
    return _reconstruction("sparsegpt", *solvers, damping=damping, block=block)


def alps(*, damping: float = 0.01) -> Reconstruction:
    """ALPS (Meng et al., NeurIPS 2024): choose support and weights of a layer by splitting.

    Args:
        damping: added to the diagonal of the Gram matrix, in means of it.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    _check(damping=damping)
    solvers = Alps(damping), Alps(damping, published=True)
    return _reconstruction("alps", *solvers, damping=damping)


def alps_plus(*, damping: float = 0.003, own_damping: float = 0.02) -> Reconstruction:
    """ALPS with damping by input, a penalty that grows more slowly, and a full refit.

    Of this project, not published. At equal sparsity its error is below that of ALPS on the inputs
    that it saw and on others.

    Args:
        damping: added to the diagonal of the Gram matrix, in means of it.
        own_damping: added to the diagonal, in its own elements: noise of that share of the power of
            each input.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    _check(damping=damping, own_damping=own_damping)
    solver = Alps(damping, own_damping, growth=(1.15, 1.1, 1.05), refit_steps=20, tolerance=1e-4)
    return _reconstruction("alps+", solver, None, damping=damping, own_damping=own_damping)


def refit(*, damping: float = 0.01) -> Reconstruction:
    """The mask of Wanda, and the least squares on it for the weights that stay.

    Args:
        damping: added to the diagonal of the Gram matrix, in means of it.

    Raises:
        UnsupportedError: if a value makes no sense.
    """
    _check(damping=damping)
    return Reconstruction(
        "refit", Wanda(), RowAllocation(), parameters={"damping": damping}, solver=Refit(damping)
    )


def _reconstruction(
    name: str, solver: Solver, published: Solver | None, **parameters: float
) -> Reconstruction:
    return Reconstruction(
        name,
        Magnitude(),
        LayerAllocation(),
        parameters=parameters,
        solver=solver,
        published_solver=published,
    )


def _check(**dampings: float) -> None:
    for name, value in dampings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UnsupportedError(
                f"{name}={value!r}; give a number above 0 (0.01 is usual): without damping the "
                "weights fit these inputs alone"
            )
