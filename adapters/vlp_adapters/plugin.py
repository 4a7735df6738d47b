"""The plug-in: adapters of the model families in this package.

Importing it imports no modelling library. Each adapter is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlp_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from vlp_plugins.models.adapter import Adapter


@hookimpl
def vlp_adapters() -> Mapping[str, Callable[[], Adapter]]:
    """BLIP, X-VLM, CLIP, SigLIP, ViT/DINO, and all other models of transformers."""
    return {
        "blip": lambda: _make("blip.adapter", "BlipAdapter"),
        "xvlm": lambda: _make("xvlm.adapter", "XvlmAdapter"),
        "clip": lambda: _make("clip.adapter", "ClipAdapter"),
        "siglip": lambda: _make("clip.siglip", "SiglipAdapter"),
        "vit": lambda: _make("vit.adapter", "ViTAdapter"),
        "transformers": _transformers,
    }


def _transformers(
    *, include: Sequence[str] | str = (), exclude: Sequence[str] | str = ()
) -> Adapter:
    settings = {"include": include, "exclude": exclude}
    return _make("transformers.adapter", "TransformersAdapter", **settings)


def _make(module: str, name: str, **settings: Any) -> Adapter:
    adapter: Adapter = getattr(import_module(f"vlp_adapters.{module}"), name)(**settings)
    return adapter
