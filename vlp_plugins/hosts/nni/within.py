"""An adapter whose model has fewer prunable weights: those that a `config_list` selects."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from vlp_plugins.adapter import Adapter, WeightSpec
from vlp_plugins.delegating import DelegatingAdapter
from vlp_plugins.weights import WeightMap


class Within(DelegatingAdapter):
    """Another adapter, restricted to some of its weights; all the rest is as there."""

    def __init__(self, adapter: Adapter, names: Collection[str]) -> None:
        """Restricts `adapter` to the weights of these canonical names."""
        super().__init__(adapter)
        self._names = frozenset(names)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        """The specs of the chosen weights; with all that turn out to be the same tensors."""
        found = WeightMap.of(model, self.adapter)
        paths = {path for name in self._names for path in found[name].aliases}
        return (s for s in self.adapter.weights(model) if s.owners[0].path in paths)
