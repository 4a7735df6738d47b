"""Image classifiers of transformers: made of a vision tower, their logits, their loss."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

TASK = "classification"
_SUFFIX = "ForImageClassification"


def image_classifier(model: Any, classes: int | None) -> nn.Module:
    """The classifier of a model's family with the weights of its vision tower, and a new head.

    Args:
        model: what stands before `Model` or the suffix in its class is the family. A classifier
            of as many classes is returned itself.
        classes: how many are told apart.

    Raises:
        UnsupportedError: if the family has no classifier, or the number is missing or below 2.
    """
    name = type(model).__name__
    if name.endswith(_SUFFIX) and classes in (None, model.config.num_labels):
        whole: nn.Module = model
        return whole
    if classes is None or classes < 2:
        raise UnsupportedError(
            f"a classifier tells 2 or more classes apart, not {classes}; give classes"
        )
    family = name.removesuffix(_SUFFIX).removesuffix("Model")
    build = getattr(sys.modules[type(model).__module__], family + _SUFFIX, None)
    if build is None:
        raise UnsupportedError(
            f"transformers has no {family}{_SUFFIX}, so {name} becomes no classifier; take a "
            "family that has one"
        )
    config = deepcopy(model.config)
    config.num_labels = classes
    made = build(config)
    prefix = tower_prefix(model)
    places = made.state_dict()
    state = {prefix + path: tensor for path, tensor in model.state_dict().items()}
    found = {path: state[path] for path in places if path in state and not _is_head(path)}
    if lacking := [path for path in places if path not in found and not _is_head(path)]:
        raise UnsupportedError(
            f"{name} has nothing for {lacking[0]} of {type(made).__name__}; give the pre-training "
            "model"
        )
    made.load_state_dict(found, strict=False)
    there: nn.Module = made.to(model.device, model.dtype).train(model.training)
    return there


def tower_prefix(model: Any) -> str:
    """What stands before the paths of a model in its family's classifier."""
    is_tower = type(model).__name__.endswith("Model") and not hasattr(model, "vision_model")
    return f"{model.base_model_prefix}." if is_tower else ""


def _is_head(path: str) -> bool:
    return path.startswith("classifier.")


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
