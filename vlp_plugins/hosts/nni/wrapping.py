"""The wrappers of a pruner, and the masks in them: one for all names of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn

from vlp_plugins.hosts.nni.scopes import Place
from vlp_plugins.hosts.nni.wrapper import SharingWrapper
from vlp_plugins.runtime.errors import UnsupportedError

NniMasks = dict[str, dict[str, Any]]
"""By module path and parameter name a tensor of ones and zeros, 1 = kept; None is no mask."""


def wrappers_for(
    model: nn.Module, places: Iterable[Place], existed: Mapping[str, ModuleWrapper]
) -> dict[str, ModuleWrapper]:
    """A wrapper for every place, and those that other compressors have; none is put in place.

    Raises:
        UnsupportedError: if another compressor prunes a place already, or fuses its layer.
    """
    wrappers = dict(existed)
    for place in places:
        module = model.get_submodule(place.module)
        kind = type(module).__name__
        if kind not in PruningSetting.registry:
            PruningSetting.register(kind, PruningSetting.default_setting)
        wrapper = wrappers.get(place.module)
        if wrapper is None:
            wrapper = SharingWrapper(module, place.module)
        elif wrapper.fused_modules or place.parameter in wrapper.pruning_target_spaces:
            raise UnsupportedError(
                f"{place.module} is pruned or fused by another compressor already; leave it out of "
                "this config_list"
            )
        elif not isinstance(wrapper, SharingWrapper):
            wrapper = SharingWrapper.adopt(wrapper)
        wrapper.keep(place.parameter)
        wrappers[place.module] = wrapper
    return wrappers


def share_masks(wrappers: Mapping[str, ModuleWrapper], places: Iterable[Place]) -> None:
    """Makes one tensor of the masks of all names of a weight."""
    first: dict[int, tuple[ModuleWrapper, str]] = {}
    for place in places:
        wrapper, mask = wrappers[place.module], f"{place.parameter}_mask"
        held = id(wrapper._parameters[place.parameter])
        leader, its = first.setdefault(held, (wrapper, mask))
        wrapper._buffers[mask] = leader._buffers[its]


def make_floating(wrappers: Mapping[str, ModuleWrapper], places: Iterable[Place]) -> None:
    """Gives masks the dtype of their weights: what NNI's schedules hand out as they find it."""
    places = list(places)
    for place in places:
        wrapper, mask = wrappers[place.module], f"{place.parameter}_mask"
        dtype = _dtype_of(wrapper.pruning_target_spaces[place.parameter])
        wrapper._buffers[mask] = wrapper._buffers[mask].to(dtype)
    share_masks(wrappers, places)


def masks_in(wrappers: Mapping[str, ModuleWrapper]) -> NniMasks:
    """Copies of all masks in the dtype of the weights; names of one weight share a copy."""
    made: dict[int, torch.Tensor] = {}
    found: NniMasks = {}
    for path, wrapper in wrappers.items():
        found[path] = {}
        for name, space in wrapper.pruning_target_spaces.items():
            mask = space.mask
            if mask is not None and id(mask) not in made:
                made[id(mask)] = mask.to(_dtype_of(space), copy=True)
            found[path][name] = None if mask is None else made[id(mask)]
    return found


def _dtype_of(space: PruningTargetSpace) -> torch.dtype:
    """What NNI's own masks of a target have: the dtype of the target."""
    of = space.mask if space.target is None else space.target
    return of.dtype
