"""An image classifier: its logits, and its loss with labels that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import BatchError, UnsupportedError


def classifier_loss(model: nn.Module, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """Mean cross-entropy of the labels of a batch.

    Args:
        model: a classifier of `C` classes, whose head is `classifier`.
        inputs: arguments of its forward, without labels.
        batch: `labels`, `[B]` integers from 0 to C - 1.

    Raises:
        UnsupportedError: if the model has no classifier.
        BatchError: if the batch has no labels, or labels that do not fit.
    """
    if not _has_classifier(model):
        raise UnsupportedError(
            f"{type(model).__name__} has no classifier, and gradient methods need its loss; "
            "take its ...ForImageClassification model (vlp finetune --task classification makes "
            "one) or a method without gradients, or in Python give ModuleAdapter(model, loss=...)"
        )
    labels = batch.get("labels")
    if labels is None:
        raise BatchError(
            "gradient methods need labelled batches: batch has no labels (it has: "
            f"{', '.join(batch)}); give images in one folder per class, named as the classes in "
            "the model's config.json, or take a method without gradients"
        )
    logits: Tensor = model(**inputs).logits
    size, classes = logits.shape
    if labels.shape != (size,) or labels.is_floating_point():
        raise BatchError(
            f"labels should be {size} integers, one per image; they are "
            f"{list(labels.shape)} {labels.dtype}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise BatchError(f"labels go from {low} to {high}; the model has {classes} classes")
    return nn.functional.cross_entropy(logits, labels)


def classifier_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """`[B, C]` logits.

    Args:
        model: a classifier of `C` classes, whose head is `classifier`.
        inputs: arguments of its forward.

    Raises:
        UnsupportedError: if the model has no classifier.
    """
    if not _has_classifier(model):
        raise UnsupportedError(
            f"{type(model).__name__} has no classifier, so it tells no classes apart; load the "
            "...ForImageClassification model"
        )
    logits: Tensor = model(**inputs).logits
    return logits


def _has_classifier(model: nn.Module) -> bool:
    head = getattr(model, "classifier", None)
    return head is not None and not isinstance(head, nn.Identity)
