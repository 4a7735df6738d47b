"""Models of images that no adapter knows: captions are kept from their processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from vlp_plugins.data.processors import Processor
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.generic import ModuleAdapter


class ImagesOnly:
    """A processor that makes `pixel_values` and lets texts fall.

    `ModuleAdapter` knows nothing about its model and passes images and texts alike; the adapter of
    a family of image models passes images only by itself.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Makes the tensors of `images`, a list of PIL images."""
        return self._processor(images=inputs["images"], return_tensors="pt")


def takes_no_text(model: nn.Module, adapter: Adapter) -> bool:
    """True for a model that `ModuleAdapter` describes and that has no input of words."""
    if not isinstance(adapter, ModuleAdapter):
        return False
    return "input_ids" not in inspect.signature(model.forward).parameters
