"""The adapter of a model that a user of NNI hands over without one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from nni.compression.utils import Evaluator, TorchEvaluator, TransformersEvaluator
from torch import nn

from vlp_plugins.methods.resolve import resolve_adapter
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import UnclaimedModelError

_log = logging.getLogger(__name__)


def adapter_of(
    model: nn.Module, adapter: Adapter | str | None, evaluator: Evaluator | None
) -> Adapter:
    """The adapter that is meant; any module has one.

    Args:
        model: to be pruned.
        adapter: name or instance; None: who claims the model, else a `ModuleAdapter`.
        evaluator: whose loss gradient methods differentiate where the model has no adapter.

    Raises:
        VlpError: see `resolve_adapter`.
    """
    try:
        return resolve_adapter(model, adapter)
    except UnclaimedModelError:
        _log.info("no adapter claims %s; its layers go by their paths", type(model).__name__)
        return ModuleAdapter(model, loss=loss_of(evaluator))


def loss_of(evaluator: Evaluator | None) -> Callable[[nn.Module, Any], torch.Tensor] | None:
    """What an evaluator trains with; None if it does not say in a form that can be called.

    Of `TorchEvaluator` the `training_step(batch, model)` that NNI documents, of
    `TransformersEvaluator` the trainer's `compute_loss`.
    """
    if isinstance(evaluator, TransformersEvaluator):
        trainer = evaluator.traced_trainer
        return lambda model, batch: _loss(trainer.compute_loss(model, dict(batch)))
    if isinstance(evaluator, TorchEvaluator):
        step = evaluator._ori_training_step
        return lambda model, batch: _loss(step(batch, model))
    return None


def _loss(output: Any) -> torch.Tensor:
    """The loss among what a training step returns, by NNI's rules."""
    if isinstance(output, Mapping):
        return output["loss"]
    return output[0] if isinstance(output, (tuple, list)) else output
