"""Adapters that are another adapter except for what a subclass overrides."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import wraps
from typing import Any

from torch import nn

from vlp_plugins.models.adapter import (
    Adapter,
    WeightSpec,
)
from vlp_plugins.models.weights import WeightMap


def _delegated(name: str) -> Any:
    """A method of `Adapter` that calls the same of `self.adapter`."""

    @wraps(getattr(Adapter, name), updated=())
    def method(self: DelegatingAdapter, *args: Any, **options: Any) -> Any:
        return getattr(self.adapter, name)(*args, **options)

    return method


class DelegatingAdapter(Adapter):
    """Delegates every method of `Adapter` to another one, but not those of tasks (captions, ...).

    Attributes:
        adapter: the other one.
    """

    def __init__(self, adapter: Adapter) -> None:
        """Goes by the name of `adapter`."""
        self.name = adapter.name
        self.takes_sequences = adapter.takes_sequences
        self.adapter = adapter

    claims = _delegated("claims")
    weights = _delegated("weights")
    streams = _delegated("streams")
    exclusions = _delegated("exclusions")
    blocks = _delegated("blocks")
    losses = _delegated("losses")
    loss_state = _delegated("loss_state")
    advance = _delegated("advance")
    split_fused = _delegated("split_fused")
    followers = _delegated("followers")
    for_task = _delegated("for_task")
    downstream_model = _delegated("downstream_model")
    task_losses = _delegated("task_losses")
    load = _delegated("load")
    describe = _delegated("describe")
    collate = _delegated("collate")
    settings = _delegated("settings")
    original_name = _delegated("original_name")
    original_part = _delegated("original_part")


class Within(DelegatingAdapter):
    """Another adapter, restricted to some of its weights."""

    def __init__(self, adapter: Adapter, names: Collection[str]) -> None:
        """Restricts `adapter` to the weights of these canonical names."""
        super().__init__(adapter)
        self._names = frozenset(names)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """The specs of the chosen weights, and of those that share memory with one."""
        found = WeightMap.of(model, self.adapter)
        paths = {path for name in self._names for path in found[name].aliases}
        return (s for s in self.adapter.weights(model) if s.owners[0].path in paths)
