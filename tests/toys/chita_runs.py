"""Runs of CHITA on the toy model whose losses remember earlier batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from toy import toy_batches
from toy_loss import LosingAdapter, LosingToy, losing_toy

from vlp_plugins.methods.method import Context
from vlp_plugins.models.weights import WeightMap

BATCHES = 6


def context_of(model: LosingToy | None = None, **options) -> Context:
    """A context over six batches of three pairs, sparsity one half unless told otherwise."""
    model = model or losing_toy()
    adapter = LosingAdapter()
    weights = WeightMap.of(model, adapter)
    defaults = {"batches": toy_batches(BATCHES), "targets": [0.5]}
    return replace(Context(model, adapter, weights, **defaults), **options)


def values_of(context: Context) -> dict[str, torch.Tensor]:
    """Everything the model holds, cloned."""
    return {name: value.clone() for name, value in context.model.state_dict().items()}


def pruned_weights(context: Context, masks) -> dict[str, torch.Tensor]:
    """The prunable weights of a fresh model after the masks and their values are applied."""
    model = losing_toy()
    adapter = LosingAdapter()
    masks.apply(model, adapter)
    return {name: w.parameter.detach() for name, w in WeightMap.of(model, adapter).items()}
