"""Where a model runs, and in which precision."""

from __future__ import annotations

import torch

from vlp_plugins.errors import UnsupportedError, first_line, suggest


def default_device(device: str | None) -> torch.device:
    """The device of that name; None takes a GPU if there is one.

    Raises:
        UnsupportedError: if there is no such device.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used ({first_line(error)}); write cpu, or leave it out"
        ) from error
    return found


_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype for `torch.autocast`; None for none.

    Raises:
        UnsupportedError: for anything but bfloat16 and float16.
    """
    if dtype is None or dtype in _PRECISIONS.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise UnsupportedError(f"autocast {name!r} is unknown{suggest(name, list(_PRECISIONS))}")
    return _PRECISIONS[name]


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name; None for None.

    Raises:
        UnsupportedError: for anything but float32, bfloat16 and float16.
    """
    known = {"float32": torch.float32, **_PRECISIONS}
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UnsupportedError(f"dtype {name!r} is unknown{suggest(name, list(known))}")
    return known[name]
