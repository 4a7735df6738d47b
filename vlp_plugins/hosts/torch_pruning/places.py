"""Which module of a model is which part of which weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlp_plugins.hosts.torch_pruning.vectors import Section
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StructureError


@dataclass
class Place:
    """A layer, and what is left of it.

    Attributes:
        path: of the module.
        weight: canonical name of the weight that was scored.
        shape: `[out, in * height * width]` of that weight.
        spread: elements of a row per input: 1, of a convolution height * width.
        rows: int64, the rows of the weight that are left; a layer split out of a fused one starts
            with its own.
        columns: int64, the inputs that are left.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    spread: int
    rows: Tensor
    columns: Tensor

    def section(self) -> Section:
        """What is left, element by element."""
        columns = self.columns
        if self.spread > 1:
            within = torch.arange(self.spread, device=columns.device)
            columns = (columns[:, None] * self.spread + within).flatten()
        return Section(self.rows, columns, self.shape)

    def check(self, layer: nn.Module) -> Tensor:
        """The weight of a layer as `[rows, columns]`.

        Raises:
            StructureError: if it is not as large as what should be left of it.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        expected = (len(self.rows), len(self.columns))
        if tuple(weight.shape[:2]) != expected:
            raise StructureError(
                f"{self.path} is {list(weight.shape[:2])}, but what was scored and then cut leaves "
                f"{list(expected)}: it was cut by other means than the pruner that asks this "
                "importance; call its refresh(), or make it anew"
            )
        return weight.detach().flatten(1)


def places_of(weights: WeightMap) -> list[Place]:
    """Every layer that has a prunable weight, once for each module path."""
    found = []
    for weight in weights.values():
        spread = weight.parameter[0, 0].numel()
        outputs, inputs = weight.rows_and_columns
        for path in dict.fromkeys(owner.module for owner in weight.owners):
            rows = torch.arange(outputs, device="cpu")
            columns = torch.arange(inputs // spread, device="cpu")
            found.append(Place(path, weight.name, (outputs, inputs), spread, rows, columns))
    return found


def at_modules(model: nn.Module, places: Sequence[Place]) -> dict[nn.Module, list[Place]]:
    """The places at every module that is there now: several where one module has several paths.

    A fused layer that was split since is found in the three that took its place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, list[Place]] = {}
    for place in places:
        if (module := modules.get(place.path)) is not None:
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                found.setdefault(module, []).append(place)
            continue
        for part, layer in _split(place, modules):
            found.setdefault(layer, []).append(part)
    return found


_SPLIT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def _split(place: Place, modules: dict[str, nn.Module]) -> Iterator[tuple[Place, nn.Module]]:
    """The three parts of a fused layer that is no longer there."""
    parent = place.path.rpartition(".")[0]
    for names in _SPLIT:
        paths = [f"{parent}.{name}" if parent else name for name in names]
        if all(isinstance(modules.get(path), nn.Linear) for path in paths):
            for path, rows in zip(paths, place.rows.chunk(3), strict=True):
                part = Place(path, place.weight, place.shape, 1, rows, place.columns.clone())
                yield part, modules[path]
