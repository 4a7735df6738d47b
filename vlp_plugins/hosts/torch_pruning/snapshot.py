"""A model's way back: references to all that cutting replaces."""

from __future__ import annotations

from typing import Any

from torch import nn

_KINDS = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What the modules of a model hold: cutting makes new tensors, so references will do."""

    def __init__(self, model: nn.Module, *, copy: bool = False) -> None:
        """Remembers a model as it is.

        Args:
            model: the model.
            copy: also copies all values, which training between two cuts will change.
        """
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = [
            (module, _state_of(vars(module))) for module in model.modules()
        ]
        self._tensors = [
            (p, p.data.clone() if copy else p.data, p.grad) for p in model.parameters()
        ]
        self._buffers = [(b, b.clone()) for b in model.buffers()] if copy else []

    def restore(self) -> None:
        """Puts every module, attribute and tensor in its place again."""
        for module, state in self._modules:
            for name in set(vars(module)) - set(state):
                del vars(module)[name]
            vars(module).update(_state_of(state))
        for parameter, data, gradient in self._tensors:
            parameter.data, parameter.grad = data, gradient
        for buffer, values in self._buffers:
            buffer.copy_(values)


def _state_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if name in _KINDS else value for name, value in state.items()}
