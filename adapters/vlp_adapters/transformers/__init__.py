"""One adapter for every model of transformers that no other adapter claims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_adapters.transformers.adapter import TransformersAdapter as TransformersAdapter

__all__ = ["TransformersAdapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlp_adapters.transformers import adapter

    return getattr(adapter, name)
