"""Methods that reconstruct every layer, each with a solver."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.calibration.moments import INPUT_GRAM, InputGram, Statistic
from vlp_plugins.masks.packed import Pruned, pack
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Solver, solved
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import UnsupportedError, VlpError
from vlp_plugins.runtime.memory import text_of, usable_bytes
from vlp_plugins.scoring.selection import Selection
from vlp_plugins.scoring.threshold import Cut


@dataclass(frozen=True)
class Reconstruction(Composition):
    """A composition whose masks, and the values of what stays, a solver chooses layer by layer.

    The allocation says how many elements each layer keeps, by the score; the solver sees the layer
    and the Gram matrix of its inputs. In a walk over the model these are the inputs in the dense
    model, and the Gram matrices of all layers are held at once; in a walk by blocks those behind
    pruned blocks, and the matrices of one block.

    Attributes:
        solver: chooses support and values.
    """

    solver: Solver = field(default_factory=Alps)
    changes_weights: ClassVar[bool] = True

    @classmethod
    def by(cls, solver: Solver, name: str | None = None) -> Reconstruction:
        """The method that a solver is by itself.

        Args:
            solver: with its score and allocation.
            name: of the method; None: that of the solver.

        Raises:
            UnsupportedError: if the solver has no name, or records what is not JSON.
        """
        kind = type(solver).__name__
        own = getattr(solver, "name", None)
        if not isinstance(own, str) or not own:
            raise UnsupportedError(
                f"solver {kind} has no name; give its class one, name = {kind.lower()!r}"
            )
        named = name or own
        parameters = solver.record()
        for key, value in parameters.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UnsupportedError(
                    f"solver {named!r} records {key}={value!r:.80}, which a mask file cannot keep "
                    f"as JSON; leave it out of record(), or name it in {kind}.internal"
                ) from error
        return cls(named, solver.score, solver.allocation, parameters=parameters, solver=solver)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs, InputGram())

    def gradients(self, *, published: bool = False) -> GradientRows | None:
        solver = self._variant(published=published)
        found = None if solver is None else solver.gradients
        if found is not None and not isinstance(found, GradientRows):
            raise UnsupportedError(
                f"gradients of solver {self.name!r} is {found!r:.80}; it must be GradientRows(), "
                "or None for none"
            )
        return found

    @property
    def takes_gradients(self) -> bool:
        return self.gradients() is not None or super().takes_gradients

    def why_blocks(self, *, published: bool = False) -> str:
        asked = self.gradients(published=published)
        mine = "reads gradients of a block at a time" if asked is not None else ""
        return super().why_blocks(published=published) or mine

    @property
    def relative_cost(self) -> str:
        return "5 per sparsity, and a solver" if self.gradients() else "1, and a solver"

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

    def _variant(self, *, published: bool) -> Solver | None:
        """The solver, or that of the published code; None if there is none."""
        if not published:
            return self.solver
        found = self.solver.as_published()
        if found is not None and not isinstance(found, Solver):
            raise UnsupportedError(
                f"as_published of solver {self.name!r} returned {found!r:.80}; it must return a "
                "Solver, or None for none"
            )
        return found

    def _solver(self, context: Context) -> Solver:
        solver = self._variant(published=context.published)
        if solver is None:
            raise UnsupportedError(
                f"method {self.name!r} has no published variant; leave out variant='published'"
            )
        return solver

    def reduced(
        self,
        context: Context,
        weight: Weight,
        scores: torch.Tensor,
        selections: Sequence[Selection],
        mean: Callable[[str, str], torch.Tensor],
        rows: torch.Tensor | None = None,
    ) -> list[Pruned]:
        # A copy: a solver may write into it, and the memory of float32 weights is the user's.
        matrix = weight.matrix.detach().to(torch.float32, copy=True)
        rules = [Largest(each.remove) if isinstance(each, Cut) else each for each in selections]
        try:
            gram = mean(INPUT_GRAM, weight.name).to(matrix.device).view(matrix.shape[1], -1)
            layer = Layer(matrix, gram, None if rows is None else rows.to(matrix.device))
            exact = not context.published
            found = solved(self._solver(context), layer, scores, rules, exact=exact)
        except VlpError as error:
            raise type(error)(f"weight {weight.name!r}: {error}") from error
        return [
            Pruned(pack(support.view(weight.shape).cpu()), fitted[support].float().cpu())
            for support, fitted in found
        ]
