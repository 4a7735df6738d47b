"""The compositions by name, as functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.papers.compositions.joint import JointTraining
from benchmarks.papers.compositions.refit import Refit
from benchmarks.papers.compositions.staged import Staged
from benchmarks.papers.ways import LAMBDA
from vlp_plugins.allocation import GlobalAllocation, ModalityAllocation
from vlp_plugins.methods.base import Composition, Method
from vlp_plugins.methods.tamt import Tamt
from vlp_plugins.plugins import registry
from vlp_plugins.scorers.information_flow import InformationFlow
from vlp_plugins.scorers.lamp import Lamp
from vlp_plugins.scorers.layer_l2 import LayerL2
from vlp_plugins.scorers.magnitude import Magnitude
from vlp_plugins.scorers.snip import Snip
from vlp_plugins.scorers.wanda import Wanda

_SCORES = {
    "flow": InformationFlow,
    "lamp": Lamp,
    "l2": LayerL2,
    "magnitude": Magnitude,
    "snip": Snip,
    "wanda": Wanda,
}


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
    return registry().method(name, **parameters)


COMPOSITIONS: Mapping[str, Callable[..., Method]] = {
    "within": within,
    "refit": refit,
    "joint": JointTraining,
    "staged": staged,
    "tamt-from-lamp": partial(Tamt, start="lamp"),
}
