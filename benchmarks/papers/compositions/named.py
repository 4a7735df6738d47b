"""The compositions by name, as functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.papers.compositions.joint import JointTraining
from benchmarks.papers.compositions.refit import ROW, Refit, pieces_of
from benchmarks.papers.ways import LAMBDA
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost, Method, Procedure
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.methods.tamt.method import Tamt
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.scoring.allocation import GlobalAllocation, ModalityAllocation
from vlp_plugins.scoring.information_flow import InformationFlow
from vlp_plugins.scoring.lamp import Lamp
from vlp_plugins.scoring.magnitude import LayerL2, Magnitude
from vlp_plugins.scoring.snip import Snip
from vlp_plugins.scoring.wanda import Wanda

_SCORES = {
    "flow": InformationFlow,
    "lamp": Lamp,
    "l2": LayerL2,
    "magnitude": Magnitude,
    "snip": Snip,
    "wanda": Wanda,
}


@dataclass(frozen=True)
class Staged(Procedure):
    """Two methods after each other: the second prunes what the first has left, with its values.

    The first goes half the way: the density that it leaves is the root of the target's.

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
        before = self.first.run(there)[0]
        with restored(weights):
            before.apply(context.model, context.adapter)
            after = self.second.run(replace(context, targets=[target]))[0]
            kept = {name: after[name] for name in weights}
            values = {
                name: weight.parameter.detach().clone() * kept[name]
                for name, weight in weights.items()
            }
        return Masks.from_dense(kept, after.manifest, values)


def within(score: str, by: str, *, modality: bool = True) -> Composition:
    """One score within layers, another between them.

    Args:
        score: ranks the weights of a layer.
        by: says how many each layer keeps.
        modality: every modality is pruned to the target.
    """
    allocation = ModalityAllocation() if modality else GlobalAllocation()
    name = f"{score}-by-{by}"
    return Composition(name, _SCORES[score](), allocation, allocation_score=_SCORES[by]())


def refit(base: str, ridge: float = LAMBDA, rows: int = 4, **parameters: Any) -> Refit:
    """CHITA's weight update on the support of another method."""
    return Refit(_method(base, **parameters), ridge, rows)


def staged(first: str, second: str, *, rounds: int = 4, steps: int = 48) -> Staged:
    """CHITA or CHITA++ half the way, mask training for the rest."""
    parameters: dict[str, Any] = {"lambda": LAMBDA}
    if first == "chita++":
        parameters["rounds"] = rounds
    return Staged(_method(first, **parameters), _method(second, steps=steps))


def _method(name: str, **parameters: Any) -> Method:
    if name in COMPOSITIONS:
        return COMPOSITIONS[name](**parameters)
    return make_method(registry(), name, **parameters)


COMPOSITIONS: Mapping[str, Callable[..., Method]] = {
    "within": within,
    "refit": refit,
    "joint": JointTraining,
    "staged": staged,
    "tamt-from-lamp": partial(Tamt, start="lamp"),
}
