"""An adapter whose model has fewer prunable weights: those that a `config_list` selects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vlp_plugins.adapter import Adapter, Batch, Exclusion, Negatives, Stream, WeightSpec
from vlp_plugins.weights import WeightMap


class Within(Adapter):
    """Another adapter, restricted to some of its weights; all the rest is as there."""

    def __init__(self, adapter: Adapter, names: Collection[str]) -> None:
        """Restricts `adapter` to the weights of these canonical names."""
        self.name = adapter.name
        self._adapter = adapter
        self._names = frozenset(names)

    def claims(self, model: nn.Module) -> bool:
        return self._adapter.claims(model)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """The specs of the chosen weights; with all that turn out to be the same tensors."""
        found = WeightMap.of(model, self._adapter)
        paths = {path for name in self._names for path in found[name].aliases}
        return (s for s in self._adapter.weights(model) if s.owners[0].path in paths)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        return self._adapter.streams(model, batch, published=published)

    def exclusions(self, model: nn.Module) -> Iterable[Exclusion]:
        return self._adapter.exclusions(model)

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, torch.Tensor]:
        return self._adapter.losses(model, batch, negatives=negatives, published=published)

    def loss_state(self, model: nn.Module) -> Iterable[torch.Tensor]:
        return self._adapter.loss_state(model)

    def advance(self, model: nn.Module, batch: Batch, *, published: bool = False) -> None:
        self._adapter.advance(model, batch, published=published)

    def settings(self) -> dict[str, Any]:
        return self._adapter.settings()
