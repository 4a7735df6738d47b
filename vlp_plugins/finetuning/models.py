"""From a pre-training model to the one that is fine-tuned on a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.saving import REBUILT
from vlp_plugins.runtime.errors import UnsupportedError, suggest
from vlp_plugins.runtime.model_state import takes_model

TASKS = ("retrieval", "captioning", "vqa", "classification")


@takes_model
def downstream(
    model: nn.Module,
    adapter: Adapter,
    task: str,
    *,
    tokenizer: Any | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model of a task with the weights of a pre-training model, which masks of that model fit.

    Args:
        model: of pre-training, which is not changed, or of the task already. It is returned
            itself if it can be trained on the task as it is.
        adapter: claims the model.
        task: one of `TASKS`.
        tokenizer: of the texts; X-VLM's decoders must know how they begin and end.
        classes: how many a classifier tells apart.
        seed: for what the task adds, which is drawn at random; the global random state is left as
            it was.

    Raises:
        UnsupportedError: if the task is unknown, or the model cannot be fine-tuned on it.
    """
    if task not in TASKS:
        raise UnsupportedError(f"unknown task {task!r}{suggest(task, list(TASKS))}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return adapter.downstream_model(task, model, tokenizer=tokenizer, classes=classes)
        except RuntimeError as error:  # tensors of other shapes than the configuration says
            if getattr(model, REBUILT, False):
                raise UnsupportedError(
                    f"heads or units were cut out of this {type(model).__name__}; make the model "
                    f"of {task} of the dense one, and cut that"
                ) from error
            raise
