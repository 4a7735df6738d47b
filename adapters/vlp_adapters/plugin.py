"""The plug-in: adapters of the model families in this package.

Importing it imports no modelling library. Each adapter is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from vlp_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from vlp_plugins.models.adapter import Adapter


@hookimpl
def vlp_adapters() -> Mapping[str, Callable[[], Adapter]]:
    """BLIP, X-VLM, CLIP, SigLIP and ViT/DINO."""
    return {
        "blip": lambda: _make("blip.adapter", "BlipAdapter"),
        "xvlm": lambda: _make("xvlm.adapter", "XvlmAdapter"),
        "clip": lambda: _make("clip.adapter", "ClipAdapter"),
        "siglip": lambda: _make("clip.siglip", "SiglipAdapter"),
        "vit": lambda: _make("vit.adapter", "ViTAdapter"),
    }


def _make(module: str, name: str) -> Adapter:
    adapter: Adapter = getattr(import_module(f"vlp_adapters.{module}"), name)()
    return adapter
