"""Where the parameters of a model are: in it, or where accelerate keeps them; which are tied."""

from __future__ import annotations

import torch
from torch import nn

from vlp_plugins.runtime.offload import Offloaded, offloaded_in
from vlp_plugins.runtime.sharding import is_sharded, whole

Place = tuple[object, ...]


class Places:
    """The place of every parameter of a model, by path; paths of one weight have one place."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = offloaded_in(model)
        self._named = dict(model.named_parameters())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._order = {path: index for index, path in enumerate(self._parameters)}
        self._places: dict[str, Place] = {}
        self._paths: dict[Place, list[str]] = {}
        for path, parameter in self._parameters.items():
            kept = self._kept.get(path)
            place = self._places[path] = _memory(parameter) if kept is None else kept.place
            self._paths.setdefault(place, []).append(path)
        # accelerate may keep a tied weight once for each of its names.
        for prefix, module in model.named_modules() if self._kept else ():
            for target, source in (vars(module).get("all_tied_weights_keys") or {}).items():
                first, second = (f"{prefix}.{each}".strip(".") for each in (source, target))
                if first in self._places and second in self._places:
                    self.same(first, second)

    def of(self, path: str) -> Place:
        """The place of a parameter."""
        return self._places[path]

    def paths(self, place: Place) -> list[str]:
        """Every path that leads there, in the model's order."""
        return self._paths[place]

    def parameter(self, place: Place) -> nn.Parameter:
        """The parameter there; one that has values, if any has."""
        found = [self._parameters[path] for path in self._paths[place]]
        return next((each for each in found if not each.is_meta), found[0])

    def offloaded(self, place: Place) -> tuple[Offloaded, ...]:
        """Where accelerate keeps it outside of the model, once for each copy."""
        kept = (self._kept[path] for path in self._paths[place] if path in self._kept)
        return tuple({each.place: each for each in kept}.values())

    def same(self, first: str, second: str) -> bool:
        """Whether two paths are one weight; offloaded copies of equal values become one."""
        place, other = self._places[first], self._places[second]
        if place != other and (first in self._kept or second in self._kept):
            one, two = (self._read(path) for path in (first, second))
            if one.shape == two.shape and torch.equal(one, two):
                joined = [*self._paths[place], *self._paths.pop(other)]
                self._paths[place] = sorted(joined, key=self._order.__getitem__)
                self._places |= dict.fromkeys(joined, place)
        return self._places[first] == self._places[second]

    def distinct(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of the model, each once under its first path."""
        named = self._named.items()
        if not self._kept:
            return list(named)
        return [(path, p) for path, p in named if self._paths[self._places[path]][0] == path]

    def _read(self, path: str) -> torch.Tensor:
        kept = self._kept.get(path)
        return whole(self._parameters[path]).cpu() if kept is None else kept.read(device="cpu")


def filled_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model with the values of what is offloaded; tied weights are one tensor."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    kept, places = offloaded_in(model), Places(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read: dict[Place, torch.Tensor] = {}
    for name in (name for name in state if name in kept):
        place = places.of(name) if name in parameters else kept[name].place
        if place not in read:
            read[place] = kept[name].read(device="cpu")
        state[name] = read[place]
    return state


def _memory(tensor: torch.Tensor) -> Place:
    """Equal for tensors that are one view of one storage."""
    # Of a sharded tensor a process may hold nothing; ties of sharded tensors are one object.
    if tensor.numel() == 0 or tensor.device.type == "meta" or is_sharded((tensor,)):
        return (id(tensor),)
    pointer = tensor.untyped_storage().data_ptr()
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.device)
