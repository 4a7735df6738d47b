"""The update of one LoRA layer, masked in every forward pass and when it is merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class MaskedUpdate:
    """What PEFT asks, in place of its own two products, about one adapter of one layer.

    It is a `LoraVariant` in all but the base class, so that PEFT need not be imported: PEFT looks
    it up in `layer.lora_variant` and calls it (peft 0.21, `tuners/lora/layer.py`).

    The layer gives `W x + (M * s B A) dropout(x)` instead of `W x + s B A dropout(x)`, with the
    mask M, the factors A and B and their scale s.
    """

    def __init__(self, keep: torch.Tensor, *, merges: bool) -> None:
        """One byte per element of the weight is kept, on the device of the layer.

        Args:
            keep: bool, of the weight's shape.
            merges: False if the weight is shared, and the update merged by another layer.
        """
        self._removed = ~keep
        self._merges = merges

    def init(self, module: Any, adapter_name: str, **_: Any) -> None:
        """PEFT has made the factors anew; there is nothing to do."""

    def supports_lora_conversion(self) -> bool:
        """Not of any use where updates are converted to other ranks."""
        return False

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """The layer's output: that of the base layer and what the update adds to it."""
        update, bias = self.update(module, active_adapter), None
        if module.lora_bias[active_adapter]:
            bias = module.lora_B[active_adapter].bias * module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        base = module.get_base_layer()
        if isinstance(base, nn.Conv2d):
            return result + base._conv_forward(x, update, bias)
        return result + F.linear(x, update, bias)

    def merge_safe(
        self, module: Any, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A new tensor: the weight and the update."""
        return orig_weight + self._merged(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Adds the update to the weight in place, so that ties stay."""
        orig_weight.data.add_(self._merged(module, active_adapter, orig_weight))

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """A new tensor: the weight without the update."""
        return orig_weight - self._merged(module, active_adapter, orig_weight)

    def update(self, module: Any, active_adapter: str) -> torch.Tensor:
        """The masked update in the weight's shape, through which gradients flow."""
        update: torch.Tensor = module.get_delta_weight(active_adapter)
        self._removed = self._removed.to(update.device)
        return update.masked_fill(self._removed, 0)

    def _merged(self, module: Any, active_adapter: str, weight: torch.Tensor) -> torch.Tensor:
        if not self._merges:
            return torch.zeros_like(weight)
        return self.update(module, active_adapter).detach().to(weight.dtype)
