"""Wrappers that NNI puts around layers, with the module's own Parameter, so that ties survive.

NNI's own wrapper clones the weight when it wraps and again when it unwraps. That unties shared
weights and leaves optimizers with Parameters that no module has any more. While it is in place,
`state_dict` has the dense weight under the plain name, so that `save_pretrained` stores an unpruned
model. `SharingWrapper` has none of this for what our pruners prune; another compressor on the same
model (`from_compressor`) may still break ties of its own layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn

from vlp_plugins.hosts.nni.config import Place
from vlp_plugins.runtime.errors import TieError, UnsupportedError


def ties_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of every Parameter that has several."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    return [tuple(paths) for paths in found.values() if len(paths) > 1]


def restore_ties(model: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Makes the Parameters of every group one object again.

    Raises:
        TieError: if they have different values by now.
    """
    for first, *others in ties:
        parameter = model.get_parameter(first)
        for path in others:
            other = model.get_parameter(path)
            if other is parameter:
                continue
            if other.shape != parameter.shape or not torch.equal(other, parameter):
                raise TieError(
                    f"{first} and {path} were one weight and have different values now: another "
                    "compressor has wrapped them before, which unties them; make the pruner of "
                    "vlp_plugins first and the other one from it"
                )
            module, _, name = path.rpartition(".")
            setattr(model.get_submodule(module), name, parameter)


class BoolSpace(PruningTargetSpace):
    """A target whose mask is bool: a quarter of the memory, and far less time on large models."""

    def _register_mask(self) -> None:
        mask = None
        if isinstance(self.target, torch.Tensor):
            mask = torch.ones(self.target.shape, dtype=torch.bool, device=self.target.device)
        self._wrapper.register_buffer(self._mask_name, mask)


class SharingWrapper(ModuleWrapper):
    """Wraps a module whose parameters keep their identity: ties and optimizers survive.

    While it is in place the module's own attribute is the value that the last forward pass used,
    and `state_dict` of the model has the pruned weight under its plain name, next to NNI's entries.
    """

    def __init__(self, module: nn.Module, module_name: str) -> None:
        super().__init__(module, module_name, {})
        self._begin()

    @classmethod
    def adopt(cls, wrapper: ModuleWrapper) -> SharingWrapper:
        """Mends a wrapper that another compressor made and still holds; it is not in place."""
        wrapper.__class__ = cls
        wrapper._begin()
        return wrapper

    def _begin(self) -> None:
        self._order = list(self.module._parameters)
        self._handle: Any = None

    def _create_target_spaces(self, settings: Any, target_space_cls: type) -> Any:
        if target_space_cls is PruningTargetSpace:
            target_space_cls = BoolSpace
        return super()._create_target_spaces(settings, target_space_cls)

    def keep(self, name: str) -> None:
        """Holds parameter `name` of the module itself, before a target space would clone it."""
        self.register_parameter(name, self.module.get_parameter(name))

    def wrap(self) -> None:
        """Puts itself in the place of the module's forward."""
        if self.in_place:
            return
        module = self.module
        if hasattr(module, "_nni_wrapper"):
            super().wrap()  # says that another wrapper is there
        module._nni_wrapper = self
        module.forward = self.forward
        for name in self._held():
            value = module._parameters.pop(name)
            module.register_buffer(name, value.detach())
        # A partial, unlike a closure, is copied with the model (copy.deepcopy).
        correct = partial(SharingWrapper._plain_values, self)
        self._handle = module.register_state_dict_post_hook(correct)

    def unwrap(self) -> None:
        """Gives the module back its forward and the very Parameters it had."""
        if not self.in_place:
            return
        module = self.module
        self._handle.remove()
        for name in self._held():
            module._buffers.pop(name, None)
            module._parameters[name] = self._parameters[name]
        for name in self._order:  # as they were: wrapping has put the weight behind the bias
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
        if getattr(self.module_forward, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = self.module_forward
        del module._nni_wrapper

    @property
    def in_place(self) -> bool:
        """Whether the module is wrapped by this one now."""
        return self.module._modules.get("_nni_wrapper") is self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with masked weights.

        NNI's own, which also looks at inputs and outputs and empties the cache of the GPU at every
        call, runs only where more than parameters is pruned, quantised or distilled.
        """
        if self._more_than_weights:
            return super().forward(*args, **kwargs)
        module = self.module
        spaces = self.pruning_target_spaces
        try:
            for name, space in spaces.items():
                setattr(module, name, self._apply_mask_helper(self._parameters[name], space))
            return self.module_forward(*args, **kwargs)
        finally:
            # A value with a history could not be copied (copy.deepcopy) and would hold the graph.
            for name in spaces:
                setattr(module, name, self._parameters[name].detach())

    @property
    def _more_than_weights(self) -> bool:
        return bool(
            self.quantization_target_spaces
            or self.distillation_target_spaces
            or any(not _is_held(self, name, s) for name, s in self.pruning_target_spaces.items())
        )

    def _held(self) -> list[str]:
        """The names of the module's parameters that are kept here while it is wrapped."""
        spaces = {**self.quantization_target_spaces, **self.pruning_target_spaces}
        return [name for name, space in spaces.items() if _is_held(self, name, space)]

    def _plain_values(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Corrects the `state_dict` of the wrapped module.

        Tied weights are written as copies: files of tensors that share memory are refused.
        """
        for name in self._held():
            value, space = self._parameters[name].detach(), self.pruning_target_spaces.get(name)
            mask = None if space is None else space.mask
            state[f"{prefix}{name}"] = (
                value.clone() if mask is None else value.masked_fill(mask == 0, 0)
            )
            for own in (name, f"{name}_mask"):
                key = f"{prefix}_nni_wrapper.{own}"
                if key in state:
                    state[key] = state[key].detach().clone()


def _is_held(wrapper: ModuleWrapper, name: str, space: PruningTargetSpace) -> bool:
    return space.type is TargetType.PARAMETER and isinstance(
        wrapper._parameters.get(name), nn.Parameter
    )


def wrappers_in(model: nn.Module) -> dict[str, ModuleWrapper]:
    """The wrappers that are in place in a model, of any compressor, by the path of their module."""
    return {
        path: module._modules["_nni_wrapper"]
        for path, module in model.named_modules()
        if "_nni_wrapper" in module._modules
    }


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """The model without wrappers, with its dense weights as they are now."""
    placed = wrappers_in(model).values()
    for wrapper in placed:
        wrapper.unwrap()
    try:
        yield
    finally:
        for wrapper in placed:
            wrapper.wrap()


NniMasks = dict[str, dict[str, Any]]
"""By module path and parameter name a tensor of ones and zeros, 1 = kept; None is not a mask."""


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
    """Makes the masks of all names of a weight one tensor."""
    first: dict[int, tuple[ModuleWrapper, str]] = {}
    for place in places:
        wrapper, mask = wrappers[place.module], f"{place.parameter}_mask"
        held = id(wrapper._parameters[place.parameter])
        leader, its = first.setdefault(held, (wrapper, mask))
        wrapper._buffers[mask] = leader._buffers[its]


def make_floating(wrappers: Mapping[str, ModuleWrapper], places: Iterable[Place]) -> None:
    """Gives masks the dtype of their weights: NNI's schedules return them as they are."""
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
