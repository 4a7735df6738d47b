"""How a pruned model is fine-tuned on a task and measured: Table 11, scaled down.

What is kept of the paper: AdamW with its betas and weight decays, cosine for BLIP, linear with 10%
warm-up for X-VLM, cosine after as much warm-up for the ViT, mixed precision, one recipe per model
and task for every method. What is scaled: batches of 32 or 64, some hundred steps instead of
epochs, and learning rates to match (the paper's are for models a hundred times as large, trained a
hundred times as long).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.papers.world import World
from vlp_plugins.jobs.metrics import TaskMetrics
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.jobs.samples import TaskSamples, read_samples
from vlp_plugins.jobs.tasks import TASK_CLASSES, RetrievalTask, Task, TaskRequest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.tasks.finetuning.files import STATE_FILE
from vlp_plugins.tasks.finetuning.finetune import downstream, finetune
from vlp_plugins.tasks.finetuning.samples import SampleEpochs
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

SPLITS = {"dev": "val", "test": "test"}
DEV_ELSEWHERE = ("digits", "coloured")
"""Sets in layouts without development split: it lies beside them, as the test of a folder."""


@dataclass(frozen=True)
class Tuning:
    """A recipe.

    Attributes:
        task: of `vlp finetune` and `vlp evaluate`.
        data: folder below that of the downstream data.
        steps: of AdamW.
        learning_rate: the highest.
        betas: of AdamW.
        weight_decay: of matrices.
        schedule: of the learning rate.
        warmup: fraction of the steps.
        batch_size: rows of a step.
        measured: images or questions of the test, the first ones; 0: all.
        rerank: candidates of retrieval that the matching head orders.
        epochs: instead of steps, where those are 0.
        accumulate: parts that a step is computed in.
    """

    task: str
    data: str
    steps: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: str
    warmup: float
    batch_size: int = 32
    measured: int = 500
    rerank: int = 0
    epochs: int = 0
    accumulate: int = 1

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it, without what the small models do not need."""
        made = asdict(self) | {"betas": list(self.betas)}
        unused = {name for name, usual in (("epochs", 0), ("accumulate", 1)) if made[name] == usual}
        return {name: value for name, value in made.items() if name not in unused}

    def settings(self, seed: int) -> FinetuneSettings:
        """Of the optimizer."""
        return FinetuneSettings(
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup=self.warmup,
            epochs=max(1, self.epochs),
            steps=self.steps or None,
            accumulate=self.accumulate,
            autocast="bfloat16",
            seed=seed,
        )


def _blip(task: str, steps: int, rate: float, **others: Any) -> Tuning:
    return Tuning(task, "scenes", steps, rate, (0.9, 0.999), 0.05, "cosine", 0.0, **others)


def _xvlm(task: str, steps: int, rate: float, **others: Any) -> Tuning:
    return Tuning(task, "scenes", steps, rate, (0.9, 0.98), 0.01, "linear", 0.1, **others)


def _vit(data: str, steps: int, rate: float, batch_size: int) -> Tuning:
    others: dict[str, Any] = {"batch_size": batch_size, "measured": 1000}
    return Tuning("classification", data, steps, rate, (0.9, 0.999), 0.05, "cosine", 0.1, **others)


TUNINGS: dict[tuple[str, str], Tuning] = {
    ("blip", "retrieval"): _blip("retrieval", 120, 5e-4, rerank=8),
    ("blip", "captioning"): _blip("captioning", 200, 5e-4, measured=300),
    ("blip", "vqa"): _blip("vqa", 500, 3e-4, batch_size=16),
    ("xvlm", "retrieval"): _xvlm("retrieval", 120, 1e-3, rerank=8),
    ("xvlm", "captioning"): _xvlm("captioning", 160, 5e-4, measured=300),
    ("xvlm", "vqa"): _xvlm("vqa", 280, 5e-4, batch_size=16),
    ("vit", "digits"): _vit("digits", 250, 3e-4, 64),
    ("vit", "coloured"): _vit("coloured", 250, 1e-3, 64),
    ("vit", "framed"): _vit("framed", 125, 5e-4, 32),  # ten epochs, as in the paper
}
"""By model and task."""

LONGER_STEPS = 480
LONGER = f"retrieval-{LONGER_STEPS}"
"""Retrieval, fine-tuned four times as long."""
TUNINGS |= {
    (model, LONGER): replace(TUNINGS[model, "retrieval"], steps=LONGER_STEPS)
    for model in ("blip", "xvlm")
}


class OneCaptionRetrieval(RetrievalTask):
    """Every image with its first caption: three times as many pairs in the same time."""

    def read(self) -> TaskSamples:
        """The images of the data with one caption each."""
        data = super().read()
        samples = (replace(sample, texts=sample.texts[:1]) for sample in data.samples)
        return replace(data, samples=tuple(samples))


def tuned(
    world: World,
    loaded: Loaded,
    tuning: Tuning,
    masks: Masks | None,
    seed: int,
    *,
    workplace: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, float]:
    """The model of the task, fine-tuned under the masks, and the loss of its last steps.

    Args:
        world: has the data.
        loaded: the model before.
        tuning: the recipe.
        masks: of the model before; None trains all weights.
        seed: of mixture, dropout, new heads.
        workplace: folder of the state that an interrupted run goes on from; None keeps none.
        about: what else that run must have in common with this one.
    """
    data = read_samples(tuning.task, world.task_data(tuning.data), split="train")
    model: Any = downstream(
        loaded.model,
        loaded.adapter,
        tuning.task,
        tokenizer=getattr(loaded.processor, "tokenizer", None),
        classes=len(data.class_names) or None,
        seed=seed,
    )
    if loaded.adapter.name in ("xvlm", "vit") and next(model.parameters()).device.type == "cpu":
        # transformers' other attention has a very slow bfloat16 backward there
        model.set_attn_implementation("eager")
    epochs = SampleEpochs(
        data.samples,
        loaded.processor,
        loaded.adapter,
        tuning.batch_size // tuning.accumulate,
        seed=seed,
    )
    done = finetune(
        model,
        loaded.adapter,
        epochs,
        task=tuning.task,
        masks=masks,
        settings=tuning.settings(seed),
        workplace=workplace,
        resume=workplace is not None and (workplace / STATE_FILE).is_file(),
        workers=0 if world.small else 1,
        about=about,
    )
    return model, float(done.log[-1]["loss"])


def task_of(world: World, loaded: Loaded, tuning: Tuning, split: str) -> Task:
    """The task that a fine-tuned model is measured on; `loaded` has this model."""
    one = world.small and tuning.task == "retrieval"
    kind = OneCaptionRetrieval if one else TASK_CLASSES[tuning.task]
    data, part = tuning.data, SPLITS[part_of(tuning, split, small=world.small)]
    if split == "dev" and data in DEV_ELSEWHERE:
        data, part = f"{data}-dev", "test"
    request = TaskRequest(
        tuning.task,
        world.task_data(data),
        split=part,
        limit=tuning.measured or None,
        batch_size=50,
        rerank=tuning.rerank,
    )
    return kind(loaded, request)


def part_of(tuning: Tuning, split: str, *, small: bool) -> str:
    """The split that is measured on: of VQAv2 nobody has the answers of the test."""
    return "dev" if not small and tuning.task == "vqa" else split


def measured(
    world: World, loaded: Loaded, model: nn.Module, tuning: Tuning, split: str
) -> TaskMetrics:
    """Figures of a fine-tuned model."""
    weights = WeightMap.of(model, loaded.adapter)
    there = Loaded(loaded.source, model, loaded.adapter, weights, loaded.processor)
    return task_of(world, there, tuning, split).measure(_as_they_are)


def _as_they_are(batches: Iterable[Batch]) -> Iterable[Batch]:
    return batches
