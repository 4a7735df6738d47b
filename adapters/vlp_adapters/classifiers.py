"""A classifier of transformers around the vision tower of a pre-training model."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

from torch import nn

from vlp_plugins.runtime.errors import UnsupportedError

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
