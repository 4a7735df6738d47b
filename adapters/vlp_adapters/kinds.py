"""What the families' models are: classes by their names, tasks, and layers that can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from torch import nn

from vlp_plugins.runtime.errors import UnsupportedError


class Kind(StrEnum):
    """What adapters claim; the value is the task where there is one, of a tower its modality."""

    PRETRAINING = "pretraining"
    RETRIEVAL = "retrieval"
    CAPTIONING = "captioning"
    VQA = "vqa"
    NLVR = "nlvr2"
    CLASSIFIER = "classification"  # a vision tower and a head for classes
    DUAL = "dual encoder"  # two towers that meet in the contrastive loss only
    VISION = "vision"
    TEXT = "text"


Classes = Mapping[str, Kind]
"""Full names of classes, compared as text: asking about another model imports no transformers."""

FINE_TUNED = (Kind.RETRIEVAL, Kind.CAPTIONING, Kind.VQA, Kind.NLVR)
"""The tasks that BLIP and X-VLM are fine-tuned on."""


def kind_among(classes: Classes, model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is none of `classes`."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__)
    return next((classes[name] for name in names if name in classes), None)


def is_of_task(task: str, model: nn.Module, kind: Kind | None, family: str) -> bool:
    """Whether a model is fine-tuned on a task as it is; else that of the task is made of it.

    Args:
        task: one of `FINE_TUNED`.
        model: of pre-training, or of the task already.
        kind: of the model.
        family: how errors call it.

    Raises:
        UnsupportedError: if the task is unknown, or the model is of another one.
    """
    if task not in FINE_TUNED:
        raise UnsupportedError(
            f"{family} is fine-tuned on {', '.join(FINE_TUNED)}, not on {task!r}; choose one of "
            "them"
        )
    if _fits(task, kind):
        return True
    if kind is not Kind.PRETRAINING:
        raise UnsupportedError(
            f"{type(model).__name__} becomes no model of {task}; give {family}'s pre-training model"
        )
    return False


def check_task(task: str, model: nn.Module, kind: Kind | None) -> None:
    """Raises `UnsupportedError` if a model is not what is fine-tuned on a task."""
    if not _fits(task, kind):
        raise UnsupportedError(
            f"{type(model).__name__} is not what is fine-tuned on {task}; make that of it with "
            "vlp_plugins.tasks.finetuning.finetune.downstream(model, adapter, task)"
        )


def _fits(task: str, kind: Kind | None) -> bool:
    """Retrieval is trained with the losses of pre-training, so by either model."""
    return kind == task or (kind is Kind.PRETRAINING and task == Kind.RETRIEVAL)


def is_as_wide(model: Any) -> bool:
    """Whether image tokens are as wide as texts, so that cross-attention can read either."""
    config = model.config
    return bool(config.vision_config.hidden_size == config.text_config.hidden_size)


def check_linear(path: str, module: nn.Module) -> None:
    """Raises `UnsupportedError` if something wraps or replaces the linear layer at a path."""
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(
            f"{path} is a {type(module).__name__}, not a Linear layer; merge or remove what "
            "wraps it before pruning"
        )
