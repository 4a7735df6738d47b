"""What must stand where an adapter says that there is a weight to prune."""

from __future__ import annotations

from torch import nn

from vlp_plugins.runtime.errors import UnsupportedError


def check_linear(path: str, module: nn.Module) -> None:
    """Raises `UnsupportedError` if something wraps or replaces the linear layer at a path."""
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(
            f"{path} is a {type(module).__name__}, not a Linear layer; merge or remove what "
            "wraps it before pruning"
        )
