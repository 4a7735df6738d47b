"""Fits a batch of an unknown form to the signature of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vlp_plugins.runtime.errors import BatchError

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def left_out(arguments: inspect.BoundArguments) -> list[str]:
    """The names of the parameters that could have been given by position, but were not."""
    parameters = arguments.signature.parameters.values()
    taking = (*_BY_POSITION, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.kind in taking and p.name not in arguments.arguments]


def bind_batch(
    forward: Callable[..., object], batch: Mapping[str, Any] | Sequence[Any] | Tensor
) -> inspect.BoundArguments:
    """The arguments to call `forward` with.

    Args:
        forward: a bound method or function.
        batch: a mapping (by name; names that `forward` does not state are left out, unless it
            states none and takes `**kwargs`), a tuple or list (by position, for the parameters
            that have no default: what follows is rarely an input, often labels) or a tensor (the
            only argument). A forward without required parameters gets the first item, or all if
            it takes `*args` alone.

    Returns:
        `args` and `kwargs`.

    Raises:
        BatchError: if the batch does not fit.
    """
    signature = inspect.signature(forward)
    parameters = signature.parameters.values()
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        has = ", ".join(map(str, batch))
        stated = [p.name for p in parameters if p.kind in _BY_NAME]
        if not stated and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            stated = list(batch)
        kwargs = {name: batch[name] for name in stated if batch.get(name) is not None}
        if not kwargs:
            raise BatchError(f"batch has {has}; the forward takes {', '.join(stated)}")
    elif isinstance(batch, Tensor):
        has = "one tensor"
        args = (batch,)
    elif isinstance(batch, (tuple, list)):
        has = f"{len(batch)} items"
        by_position = [p for p in parameters if p.kind in _BY_POSITION]
        required = sum(p.default is inspect.Parameter.empty for p in by_position)
        any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        args = tuple(batch)
        if by_position or not any_number:
            args = args[: required or len(by_position[:1])]
    else:
        raise BatchError(
            f"batch is a {type(batch).__name__}; make it a mapping, a tuple or a tensor"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(f"batch ({has}) does not fit the forward: {error}") from error
