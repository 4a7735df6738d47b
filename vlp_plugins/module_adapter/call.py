"""Fits a batch of an unknown form to the signature of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vlp_plugins.errors import BatchError

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def bind_batch(
    forward: Callable[..., object], batch: Mapping[str, Any] | Sequence[Any] | Tensor
) -> inspect.BoundArguments:
    """The arguments to call `forward` with.

    Args:
        forward: a bound method or function.
        batch: a mapping (by name; names that `forward` does not state are left out, unless it
            states none and takes `**kwargs`), a tuple or list (by position, cut to the number that
            `forward` takes) or a tensor (the only argument).

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
        any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        taken = sum(p.kind in _BY_POSITION for p in parameters)
        args = tuple(batch) if any_number else tuple(batch)[:taken]
    else:
        raise BatchError(
            f"batch is a {type(batch).__name__}; make it a mapping, a tuple or a tensor"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(f"batch ({has}) does not fit the forward: {error}") from error
