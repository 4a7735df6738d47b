"""What is trained in place of the weights of a model: float32, whatever the model is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.sharding import write


class Masters:
    """Parameters in float32; a model in bfloat16 would lose most small steps.

    Those of float32 weights are the weights themselves, with gradients of their own.

    Attributes:
        weights: as those of the model, with the masters for parameters.
    """

    def __init__(self, weights: WeightMap) -> None:
        """Copies what is not float32."""
        self._model = weights
        self.weights = WeightMap(
            {
                name: replace(weight, parameter=nn.Parameter(weight.parameter.detach().float()))
                for name, weight in weights.items()
            },
            weights.adapter_name,
            weights.adapter_settings,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters by canonical name."""
        return {name: weight.parameter for name, weight in self.weights.items()}

    def write(self) -> None:
        """Gives the model the masters' values, in its dtype."""
        for name, weight in self._model.items():
            if weight.parameter.dtype != torch.float32:
                write(weight.parameter, self.weights[name].parameter)
