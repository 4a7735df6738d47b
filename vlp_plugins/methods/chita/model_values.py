"""Other values in the weights of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.sharding import whole, write

_HELD_BY_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def dense_again(weights: WeightMap, dense: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts the weights of a model back as they were, whatever happens inside.

    Args:
        weights: of the model.
        dense: their values now, float32, by canonical name; no copy is made of those that float32
            holds exactly.
    """
    before = {
        name: dense[name]
        if weight.parameter.dtype in _HELD_BY_FLOAT32
        else whole(weight.parameter).clone()
        for name, weight in weights.items()
    }
    try:
        yield
    finally:
        write_values(weights, before)


def write_values(weights: WeightMap, values: Mapping[str, torch.Tensor]) -> None:
    """Writes values into the parameters, in their dtype; ties stay, for the memory is the same."""
    for name, weight in weights.items():
        write(weight.parameter, values[name])
