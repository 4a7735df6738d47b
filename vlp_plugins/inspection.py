"""What a model is to the pruner: its prunable groups, its ties, and what is left alone and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.modes import takes_model
from vlp_plugins.weights import WeightMap


@dataclass(frozen=True)
class Group:
    """Prunable weights of one modality.

    Attributes:
        modality: its name.
        tensors: number of weights, each shared one counted once.
        elements: number of elements.
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
    """Parameters that are left alone for one reason."""

    reason: str
    tensors: int
    elements: int
    example: str


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
    """Describes a model as its adapter sees it.

    Args:
        model: a model that `adapter` claims; its weights may be on the meta device.
        adapter: see `vlp_plugins.adapter`.
    """
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


def _excluded(model: nn.Module, adapter: Adapter, weights: WeightMap) -> list[Excluded]:
    prunable = {path for weight in weights.values() for path in weight.aliases}
    rules = [(re.compile(rule.pattern), rule.reason) for rule in adapter.exclusions(model)]
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in model.named_parameters():
        if path not in prunable:
            reason = next((why for rule, why in rules if rule.search(path)), None)
            found.setdefault(reason or "not declared by the adapter", []).append((path, parameter))
    return [
        Excluded(reason, len(members), sum(p.numel() for _, p in members), members[0][0])
        for reason, members in found.items()
    ]
