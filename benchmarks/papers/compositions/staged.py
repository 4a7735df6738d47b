"""Two methods after each other: the second one prunes what the first has left, with its values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.papers.compositions.refit import ROW, masks_of, pieces_of
from vlp_plugins.masks import Masks
from vlp_plugins.methods.base import Context, Cost, Method, Procedure
from vlp_plugins.saving import restored
from vlp_plugins.targets import Target


@dataclass(frozen=True)
class Staged(Procedure):
    """The first method goes half the way: the density that it leaves is the root of the target's.

    Attributes:
        first: may change the weights; reads the batches in pieces of `ROW` samples.
        second: chooses among what is left.
    """

    first: Method
    second: Method
    name: str = "staged"
    parameters: dict[str, Any] = field(default_factory=dict)

    def run(self, context: Context) -> list[Masks]:
        return [self._masks(context, target) for target in context.targets]

    def cost(self, context: Context) -> Cost:
        return Cost()

    def _masks(self, context: Context, target: Target) -> Masks:
        assert isinstance(target, float)
        weights = context.weights
        halfway = 1 - (1 - target) ** 0.5
        pieces = [piece for batch in context.batches for piece in pieces_of(batch, ROW)]
        there = replace(context, batches=pieces, targets=[halfway], limit=None)
        before = masks_of(self.first, there)[0]
        with restored(weights):
            before.apply(context.model, context.adapter)
            after = masks_of(self.second, replace(context, targets=[target]))[0]
            kept = {name: after[name] for name in weights}
            values = {
                name: weight.parameter.detach().clone() * kept[name]
                for name, weight in weights.items()
            }
        return Masks.from_dense(kept, after.manifest, values)
