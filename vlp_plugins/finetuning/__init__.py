"""Fine-tuning of a pruned model on a downstream task, with the zeros kept.

    model = downstream(pretrained, adapter, "captioning", tokenizer=tokenizer)
    finetune(model, adapter, batches, task="captioning", masks=masks, settings=settings)

Masks of the pre-training model are inherited by the downstream one.
"""

from __future__ import annotations

from vlp_plugins.finetuning.engine import Engine, OneDevice
from vlp_plugins.finetuning.models import TASKS, downstream
from vlp_plugins.finetuning.running import Finetuned, finetune
from vlp_plugins.finetuning.settings import FinetuneSettings

__all__ = [
    "TASKS",
    "Engine",
    "FinetuneSettings",
    "Finetuned",
    "OneDevice",
    "downstream",
    "finetune",
]
