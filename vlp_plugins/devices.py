"""Where a model runs."""

from __future__ import annotations

import torch

from vlp_plugins.errors import UnsupportedError, first_line


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
