"""Masks of the toy model that bring new values of what they keep."""

import torch
from toy_masks import ADAPTER, random_masks

from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap


def valued_masks(model, *, density=0.4, seed=0, values_seed=1, **about):
    """Random masks and, by canonical name, the dense tensors that their new values are from."""
    masks = random_masks(model, density=density, seed=seed, **about)
    generator = torch.Generator().manual_seed(values_seed)
    dense = {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in WeightMap.of(model, ADAPTER).items()
    }
    return Masks.from_dense(dict(masks), masks.manifest, dense), dense
