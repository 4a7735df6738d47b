"""What a model is to the pruner: its prunable groups, its ties, and what is left alone and why."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from torch import nn

from vlp_plugins.models.adapter import Adapter, Exclusion
from vlp_plugins.models.places import Places
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.model_state import takes_model

_log = logging.getLogger(__name__)

_MUCH = 0.01
"""Share of a model's matrices below which positions and class tokens alone may be what is dense."""


@dataclass(frozen=True)
class Group:
    """Prunable weights of one modality.

    Attributes:
        tensors: number of weights, each shared one counted once.
        shared: number of weights that several modules use.
        layers: number of different depths.
    """

    modality: str
    tensors: int
    elements: int
    shared: int
    layers: int


@dataclass(frozen=True)
class Excluded:
    """Parameters that are left alone for one reason.

    Attributes:
        tensors: number of parameters.
        matrices: number of elements of those with two dimensions or more.
    """

    reason: str
    tensors: int
    elements: int
    example: str
    matrices: int = 0
    by_design: bool = True


@dataclass(frozen=True)
class Inspection:
    """The answer of `vlp inspect`."""

    model: str
    adapter: str
    groups: list[Group]
    excluded: list[Excluded]
    weights: WeightMap

    @property
    def prunable(self) -> int:
        """Prunable elements."""
        return self.weights.numel

    @property
    def parameters(self) -> int:
        """All parameters, each shared one counted once."""
        return self.prunable + sum(group.elements for group in self.excluded)


@takes_model
def inspect_model(model: nn.Module, adapter: Adapter) -> Inspection:
    """Describes a model as its adapter sees it; its weights may be on the meta device."""
    weights = WeightMap.of(model, adapter)
    excluded = _excluded(model, adapter, weights)
    return Inspection(type(model).__name__, adapter.name, groups_of(weights), excluded, weights)


def groups_of(weights: WeightMap) -> list[Group]:
    """The weights by modality, in order of first appearance."""
    return [
        Group(
            modality,
            len(members),
            sum(weight.numel for weight in members),
            sum(len(weight.owners) > 1 for weight in members),
            len({weight.depth for weight in members}),
        )
        for modality, members in weights.by_modality().items()
    ]


@takes_model
def warn_of_dense(model: nn.Module, adapter: Adapter, weights: WeightMap) -> None:
    """Warns if 1% or more of the elements of a model's matrices cannot be pruned and stay dense."""
    excluded = _excluded(model, adapter, weights)
    matrices = weights.numel + sum(group.matrices for group in excluded)
    dense = [group for group in excluded if group.matrices and not group.by_design]
    share = sum(group.matrices for group in dense) / matrices
    if share < _MUCH:
        return
    _log.warning(
        "%.1f%% of the elements of this %s's matrices cannot be pruned and stay dense, so the "
        "model as a whole becomes less sparse than asked for: %s",
        100 * share,
        type(model).__name__,
        "; ".join(
            f"{100 * group.matrices / matrices:.1f}% {group.reason} (first: {group.example})"
            for group in dense
        ),
    )


def _excluded(model: nn.Module, adapter: Adapter, weights: WeightMap) -> list[Excluded]:
    prunable = {path for weight in weights.values() for path in weight.aliases}
    rules = [(re.compile(rule.pattern), rule) for rule in adapter.exclusions(model)]
    undeclared = Exclusion("", "not declared by the adapter")
    found: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in Places(model).distinct():
        if path not in prunable:
            rule = next((each for pattern, each in rules if pattern.search(path)), undeclared)
            found.setdefault((rule.reason, rule.by_design), []).append((path, parameter))
    return [
        Excluded(
            reason,
            len(members),
            sum(p.numel() for _, p in members),
            members[0][0],
            sum(p.numel() for _, p in members if p.ndim > 1),
            by_design,
        )
        for (reason, by_design), members in found.items()
    ]
