"""CLIP and SigLIP: two towers that meet in a contrastive loss.

Nothing heavy is imported until a name is used, so that listing plug-ins stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_adapters.clip.convert import load_original as load_original
    from vlp_adapters.clip.convert import save_original as save_original
    from vlp_adapters.clip.convert import state_to_original as state_to_original

_HOMES = dict.fromkeys(("load_original", "save_original", "state_to_original"), "convert")

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
