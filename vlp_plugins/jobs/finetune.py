"""`vlp finetune` from end to end: load, make the model of the task, train, write a folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.data.batches import captioned, first
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.sources import open_source
from vlp_plugins.jobs.facts import StopWatch, memory_facts
from vlp_plugins.jobs.finetune_recipe import FinetuneRecipe
from vlp_plugins.jobs.inputs import Loaded
from vlp_plugins.jobs.work_dir import claimed, delete_work, working
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.saving import check_can_save, copy_companions, write_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import made_by, versions
from vlp_plugins.runtime.distributed import wait_for_all
from vlp_plugins.runtime.errors import DataError, RecipeError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.tasks.finetuning.engine import Engine, OneDevice
from vlp_plugins.tasks.finetuning.files import LOSSES_FILE as LOG
from vlp_plugins.tasks.finetuning.finetune import Finetuned, downstream, finetune
from vlp_plugins.tasks.finetuning.samples import Sample, SampleEpochs


@dataclass(frozen=True)
class TaskSamples:
    """The data of a task.

    Attributes:
        description: what was read.
        samples: in stored order; no image is decoded yet.
        classes: names of the classes, or their numbers as text; empty for other tasks.
    """

    description: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()


def read_samples(recipe: FinetuneRecipe) -> TaskSamples:
    """Reads lists and annotations; see `open_source`, `open_questions` and `open_labelled`.

    Args:
        recipe: says which task, and where its data is.

    Raises:
        RecipeError: if it does not.
        DataError: if it is not there, or not data of the task.
    """
    recipe.check()
    return _READERS[str(recipe.task)](recipe)


def _captions(recipe: FinetuneRecipe) -> TaskSamples:
    opened = open_source(
        str(recipe.data),
        split=recipe.split,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        captions="all",
    )
    found = captioned(opened, recipe.limit)
    samples = (Sample(record.place, record.image, tuple(texts)) for record, texts in found)
    return TaskSamples(opened.description, tuple(samples))


def _questions(recipe: FinetuneRecipe) -> TaskSamples:
    found = open_questions(str(recipe.data), recipe.split)
    items = list(first(found.items, recipe.limit, found.description))
    lacking = next((item.place for item in items if not item.answers), None)
    if lacking is not None:
        raise DataError(
            f"{found.description}: {lacking} has no answers to learn (those of test sets are not "
            "published); give another --split"
        )
    samples = (Sample(item.place, item.image, (item.text,), item.answers) for item in items)
    return TaskSamples(found.description, tuple(samples))


def _labelled(recipe: FinetuneRecipe) -> TaskSamples:
    found = open_labelled(str(recipe.data), recipe.split)
    items = list(first(found.items, recipe.limit, found.description))
    if not items:
        raise DataError(f"{found.description} holds no image")
    count = max(item.label for item in items) + 1
    names = found.classes or tuple(map(str, range(count)))
    samples = (Sample(item.place, item.image, label=item.label) for item in items)
    return TaskSamples(found.description, tuple(samples), names)


_READERS: dict[str, Callable[[FinetuneRecipe], TaskSamples]] = {
    "retrieval": _captions,
    "captioning": _captions,
    "vqa": _questions,
    "classification": _labelled,
}


_log = logging.getLogger(__name__)

SCHEMA = 1
"""Of finetuning.json; a change that old code cannot read adds 1."""
MASKS = "masks.safetensors"
RECORD = "finetuning.json"


@dataclass(frozen=True)
class TunedResult:
    """What a run made.

    Attributes:
        out: the folder, whose model `load_model` reads; process 0 of several wrote it.
        done: steps and losses.
        facts: time, memory and data.
    """

    out: Path
    done: Finetuned
    facts: Mapping[str, str]


def run_finetuning(
    load: Callable[[], Loaded],
    recipe: FinetuneRecipe,
    out: Path,
    *,
    masks: Path | None = None,
    engine: Engine | None = None,
    command: str = "",
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TunedResult:
    """Fine-tunes as the recipe says and writes `out` whole or not at all.

    The folder is a checkpoint of the task's model with the processor of the pre-training model;
    beside them lie `masks.safetensors` (those that were given, without new values), `losses.jsonl`
    and `finetuning.json`. Meanwhile `OUT.work` keeps the state and the loss log.

    Args:
        load: gives the pre-training model, after the folder was found to be free.
        recipe: what to do.
        out: new folder.
        masks: a mask file of the model; None trains all weights.
        engine: computes the steps; None: in this process, on the model's device.
        command: repeats the run, for the record.
        resume: go on from `OUT.work`.
        progress: called with steps done and steps in all.

    Raises:
        VlpError: with one line that says what to do; nothing is written then.
    """
    recipe.check()
    folder = Path(os.path.abspath(out))  # noqa: PTH100  resolve() would follow links
    writes = engine is None or engine.index == 0
    with claimed(folder, writes=writes):
        return _tuned(
            load, recipe, folder, writes, masks=masks, engine=engine, command=command,
            resume=resume, progress=progress,
        )  # fmt: skip


def _tuned(
    load: Callable[[], Loaded],
    recipe: FinetuneRecipe,
    folder: Path,
    writes: bool,
    *,
    masks: Path | None,
    engine: Engine | None,
    command: str,
    resume: bool,
    progress: Callable[[int, int], None] | None,
) -> TunedResult:
    task = str(recipe.task)
    size = rows_of_a_batch(recipe, 1 if engine is None else engine.processes)
    chosen = None if masks is None else Masks.load(masks)
    watch = StopWatch()
    data = read_samples(recipe)
    loaded = load()
    model = _model(loaded, task, data, recipe)
    if chosen is not None:
        chosen.match(WeightMap.of(model, loaded.adapter))  # shows what does not fit at once
    epochs = SampleEpochs(
        data.samples, loaded.processor, loaded.adapter, size, seed=recipe.settings.seed
    )
    watch.lap("loading")
    if engine is None:
        device = next(model.parameters()).device
        engine = OneDevice(device, recipe.settings.autocast)
    with working(folder, resume=resume) as work:
        done = finetune(
            model,
            loaded.adapter,
            epochs,
            task=task,
            masks=chosen,
            settings=recipe.settings,
            engine=engine,
            workplace=work,
            resume=resume,
            checkpoint_every=recipe.checkpoint_every,
            log_every=recipe.log_every,
            workers=recipe.workers,
            about={
                "data": data.description,
                "number of samples": len(data.samples),
                "batch size": recipe.batch_size,
                "model": loaded.source.model,
            },
            progress=progress,
        )
        watch.lap("fine-tuning")
        facts = {
            "data": f"{data.description}: {len(data.samples):,} images or questions",
            "model": type(model).__name__,
            "steps": f"{done.steps:,} of {recipe.batch_size:,} rows",
            **watch.texts(),
            **memory_facts(engine.device),
        }
        if writes:
            with atomic_folder(folder) as target:
                _write(target, model, loaded, chosen, work, _record(
                    recipe, loaded, done, chosen, command, facts
                ))  # fmt: skip
    wait_for_all()
    if writes:
        delete_work(folder)
    return TunedResult(folder, done, facts)


def rows_of_a_batch(recipe: FinetuneRecipe, processes: int = 1) -> int:
    """Rows that a process computes at a time.

    Raises:
        RecipeError: if the rows of a step cannot be shared out evenly.
    """
    parts = processes * recipe.settings.accumulate
    size, rest = divmod(recipe.batch_size, parts)
    if rest or not size:
        raise RecipeError(
            f"a step of {recipe.batch_size} rows cannot be shared out among {processes} processes "
            f"that accumulate {recipe.settings.accumulate} batches each; give a multiple of {parts}"
        )
    return size


def _model(loaded: Loaded, task: str, data: TaskSamples, recipe: FinetuneRecipe) -> nn.Module:
    """The model of the task, on the device of the pre-training model."""
    model = downstream(
        loaded.model,
        loaded.adapter,
        task,
        tokenizer=getattr(loaded.processor, "tokenizer", None),
        classes=len(data.classes) or None,
        seed=recipe.settings.seed,
    )
    check_can_save(model)
    if data.classes:
        config: Any = model.config
        config.id2label = dict(enumerate(data.classes))
        config.label2id = {name: number for number, name in enumerate(data.classes)}
    return model


def _write(
    folder: Path,
    model: nn.Module,
    loaded: Loaded,
    masks: Masks | None,
    work: Path,
    record: Mapping[str, Any],
) -> None:
    write_model(model, folder, source=loaded.source.model)
    copy_companions(loaded.source.processor, folder)
    if masks is not None:
        # New values were where training began; the model has others now.
        Masks.from_dense(dict(masks), masks.manifest).save(folder / MASKS)
    shutil.copyfile(work / LOG, folder / LOG)
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _record(
    recipe: FinetuneRecipe,
    loaded: Loaded,
    done: Finetuned,
    masks: Masks | None,
    command: str,
    facts: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "made_by": made_by(),
        "versions": versions(),
        "command": command,
        "model": loaded.source.model,
        "adapter": loaded.adapter.name,
        "task": recipe.task,
        "data": recipe.data,
        "split": recipe.split,
        "limit": recipe.limit,
        "batch_size": recipe.batch_size,
        "settings": recipe.settings.as_dict(),
        "steps": done.steps,
        "losses": [done.log[0]["losses"], done.log[-1]["losses"]] if done.log else [],
        "masks": None if masks is None else {
            "method": masks.manifest.method, "sparsity": masks.sparsity,
        },
        "facts": dict(facts),
    }  # fmt: skip
