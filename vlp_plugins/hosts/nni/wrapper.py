"""NNI's module wrapper, mended: it keeps the `Parameter` that it finds, and tells the truth.

NNI's own clones the weight when it wraps and again when it unwraps. That unties shared weights and
leaves optimizers with Parameters that no module has any more. While it is in place, `state_dict`
shows the dense weight under the plain name, so that `save_pretrained` stores an unpruned model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn


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
    and `state_dict` of the model has the pruned weight under its plain name beside NNI's entries.
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

    def masked(self, name: str) -> torch.Tensor:
        """A copy of parameter `name` that is zero where its mask removes."""
        value = self._parameters[name].detach()
        space = self.pruning_target_spaces.get(name)
        if space is None or space.mask is None:
            return value.clone()
        return value.masked_fill(space.mask == 0, 0)

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
        call, runs only where somebody prunes, quantises or distils more than parameters.
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
            state[f"{prefix}{name}"] = self.masked(name)
            for own in (name, f"{name}_mask"):
                key = f"{prefix}_nni_wrapper.{own}"
                if key in state:
                    state[key] = state[key].detach().clone()


def _is_held(wrapper: ModuleWrapper, name: str, space: PruningTargetSpace) -> bool:
    return space.type is TargetType.PARAMETER and isinstance(
        wrapper._parameters.get(name), nn.Parameter
    )


def wrappers_in(model: nn.Module) -> list[ModuleWrapper]:
    """The wrappers that are in place in a model, whoever put them there."""
    return [m._modules["_nni_wrapper"] for m in model.modules() if "_nni_wrapper" in m._modules]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """The model as it is without wrappers, with the dense weights of this moment."""
    placed = wrappers_in(model)
    for wrapper in placed:
        wrapper.unwrap()
    try:
        yield
    finally:
        for wrapper in placed:
            wrapper.wrap()
