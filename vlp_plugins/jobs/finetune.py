"""`vlp finetune` from end to end: load, make the model of the task, train, write a folder.

Every key of its recipe, written in YAML, is an option of the command:

    task: retrieval
    batch_size: 128
    epochs: 6
    learning_rate: 1.0e-5
    weight_decay: 0.05
    schedule: cosine

Model, masks and output folder are given on the command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.jobs.facts import (
    SPEED,
    StopWatch,
    memory_facts,
    size_tile,
    step,
    write_report,
)
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.jobs.recipe_values import (
    Readers,
    Value,
    choice,
    integer,
    number,
    read_by,
    read_section,
    read_yaml,
    readers_of,
    text,
)
from vlp_plugins.jobs.recipes import AUTOCASTS, find_recipe, need
from vlp_plugins.jobs.samples import read_samples
from vlp_plugins.jobs.work_dir import claimed, working
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.saving import REBUILT, check_can_save, copy_companions, write_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.drawing import Axis, line_chart
from vlp_plugins.report.layers import whole_sparsity
from vlp_plugins.report.page import Page, Section, Tile
from vlp_plugins.runtime.errors import RecipeError, UnsupportedError, suggest
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.numbers import count, percent
from vlp_plugins.runtime.parallel import default_workers
from vlp_plugins.tasks import TASKS
from vlp_plugins.tasks.finetuning.engine import Engine
from vlp_plugins.tasks.finetuning.files import LOSSES_FILE as LOG
from vlp_plugins.tasks.finetuning.finetune import Finetuned, downstream, finetune
from vlp_plugins.tasks.finetuning.samples import SampleEpochs
from vlp_plugins.tasks.finetuning.settings import RATES, FinetuneSettings


@dataclass(frozen=True)
class FinetuneRecipe:
    """One run of `vlp finetune`; each key is an option of it, explained in `cli.finetune`."""

    task: str | None = read_by(choice(*TASKS))
    adapter: str | None = read_by(text)
    batch_size: int = read_by(integer(1), 32)
    data: str | None = read_by(text)
    split: str | None = read_by(text)
    limit: int | None = read_by(integer(1))
    image_column: str | None = read_by(text)
    caption_column: str | None = read_by(text)
    max_length: int | None = read_by(integer(3))
    checkpoint_every: int = read_by(integer(1), 500)
    log_every: int = read_by(integer(1), 10)
    workers: int | None = read_by(integer(0))
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)


def load_finetune_recipe(path: str | Path) -> FinetuneRecipe:
    """Reads a recipe of fine-tuning, a file or one of the package; see `find_recipe`.

    Raises:
        RecipeError: for an unknown key (suggests the nearest) or a wrong value (says what was
            found), with the line.
    """
    found = read_section(
        read_yaml(find_recipe(path)),
        _READERS,
        lambda key: f" of fine-tuning{suggest(key, list(_READERS))}",
    )
    return with_finetune_options(FinetuneRecipe(), **found)


def with_finetune_options(recipe: FinetuneRecipe, **values: Any) -> FinetuneRecipe:
    """A new recipe with other values, by its keys, where one is not None.

    Raises:
        RecipeError: if a value is out of range, or a key unknown.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if unknown := next((name for name in given if name not in _READERS), None):
        raise RecipeError(f"unknown option {unknown!r}{suggest(unknown, list(_READERS))}")
    inner = {name: given.pop(name) for name in _SETTINGS if name in given}
    return replace(recipe, **given, settings=replace(recipe.settings, **inner))


def _pair(value: Value) -> tuple[float, float]:
    if not isinstance(value.data, list) or len(value.data) != 2:
        raise value.wrong("a list of two numbers, such as [0.9, 0.999]")
    one, two = map(number, value.data)
    return one, two


_SETTINGS = tuple(each.name for each in fields(FinetuneSettings))
_READERS: Readers = readers_of(FinetuneRecipe) | {
    "learning_rate": number,
    "betas": _pair,
    "epsilon": number,
    "weight_decay": number,
    "schedule": choice(*RATES),
    "warmup": number,
    "epochs": integer(1),
    "steps": integer(1),
    "accumulate": integer(1),
    "clip": number,
    "autocast": choice(*AUTOCASTS),
    "seed": integer(0),
}


SCHEMA = 1
"""Of finetuning.json; a change that old code cannot read adds 1."""
MASKS = "masks.safetensors"
RECORD = "finetuning.json"


@dataclass(frozen=True)
class TunedResult:
    """What a run made: a folder that `load_model` reads; process 0 of several wrote it."""

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
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TunedResult:
    """Fine-tunes as the recipe says and writes `out` whole or not at all.

    The folder is a checkpoint of the task's model with the processor of the pre-training model;
    next to them are `masks.safetensors` (those that were given, without new values),
    `losses.jsonl`, `finetuning.json` and `report.html`. Meanwhile `OUT.work` keeps the state.
    Without a mask file all weights are trained; without an engine, in this process and on the
    model's device. For the other arguments see `vlp_plugins.jobs`.

    Raises:
        VlpError: if the recipe, the masks or the data do not fit the model, or `out` is taken.
    """
    need(recipe, "task", "data")
    writes = engine is None or engine.index == 0
    with claimed(out, writes=writes, mark=RECORD, overwrite=overwrite) as results:
        task = str(recipe.task)
        size = rows_of_a_batch(recipe, 1 if engine is None else engine.processes)
        chosen = None if masks is None else Masks.load(masks)
        watch = StopWatch()
        data = read_samples(
            task, str(recipe.data), split=recipe.split, limit=recipe.limit,
            image_column=recipe.image_column, caption_column=recipe.caption_column,
        )  # fmt: skip
        loaded = load()
        model = _model(loaded, task, data.class_names, recipe)
        if chosen is not None:
            chosen.match(WeightMap.of(model, loaded.adapter))  # shows what does not fit at once
        epochs = SampleEpochs(
            data.samples, loaded.processor, loaded.adapter, size, seed=recipe.settings.seed
        )
        watch.lap("loading")
        if engine is None:
            engine = Engine(next(model.parameters()).device, recipe.settings.autocast)
        with working(results, resume=resume) as work:
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
                workers=default_workers() if recipe.workers is None else recipe.workers,
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
                "steps": f"{done.steps:,}, {recipe.batch_size:,} samples each",
                **watch.texts(),
                **memory_facts(engine.device),
            }
            result = TunedResult(results, done, facts)
            if writes:
                with atomic_folder(results, mark=RECORD, overwrite=overwrite) as folder:
                    write_model(model, folder, source=loaded.source.model)
                    copy_companions(loaded.source.processor, folder)
                    if chosen is not None:
                        # New values were where training began; the model has others now.
                        kept = Masks.from_dense(dict(chosen), chosen.manifest)
                        kept.save(folder / MASKS)
                    shutil.copyfile(work / LOG, folder / LOG)
                    record = _record(recipe, loaded, done, chosen, command, facts)
                    text = json.dumps(record, indent=1)
                    (folder / RECORD).write_text(text, encoding="utf-8")
                    write_report(
                        folder,
                        lambda: page_of(result, recipe, loaded, model, chosen, out, command),
                    )
        return result


def page_of(
    result: TunedResult,
    recipe: FinetuneRecipe,
    loaded: Loaded,
    model: nn.Module,
    masks: Masks | None,
    out: Path,
    command: str,
) -> Page:
    """The page; `out` as the command names it."""
    name, task, log = Path(loaded.source.model).name, str(recipe.task), result.done.log
    losses = {"loss": [(float(line["step"]), float(line["loss"])) for line in log]}
    terms = dict.fromkeys(term for line in log for term in line["losses"])
    if len(terms) > 1:
        for term in terms:
            losses[term] = [
                (float(line["step"]), line["losses"][term])
                for line in log
                if term in line["losses"]
            ]
    elements = sum(each.numel() for each in model.parameters())
    tiles = [
        Tile("Model", name, f"{type(model).__name__}, {count(elements)} parameters"),
        Tile("Task", task, result.facts["data"]),
        Tile("Steps", f"{result.done.steps:,}", f"{recipe.batch_size:,} samples each"),
    ]
    if log:
        first, last = (f"{line['loss']:.2f}" for line in (log[0], log[-1]))
        tiles.append(Tile("Training loss", f"{first} \u2192 {last}", "means of the logged steps"))
    kept = "all weights were trained"
    if masks is not None:
        kept = f"what {masks.manifest.method} had removed stayed at zero"
        weights = WeightMap.of(model, loaded.adapter)
        tiles += [
            Tile("Sparsity of the prunable part", percent(masks.sparsity)),
            Tile("Sparsity of the whole model", percent(whole_sparsity(model, weights, masks))),
            size_tile(model, weights, [masks]),
            SPEED,
        ]
    measured = step(
        "Measure it. TEST_DATA is a folder that the training has not seen.",
        *("evaluate", str(out), "--task", task, "--data", "TEST_DATA"),
        *("--out", f"{out}-evaluated"),
    )
    return Page(
        f"{name}, fine-tuned for {task}",
        command,
        f"{name} was fine-tuned for {task} in {result.done.steps:,} steps; {kept}.",
        tiles,
        steps=[measured],
        sections=[
            Section("Training loss", charts=[line_chart("", losses, x=Axis("step", whole=True))])
        ],
        facts=result.facts,
    )


def rows_of_a_batch(recipe: FinetuneRecipe, processes: int = 1) -> int:
    """Rows that a process computes at a time.

    Raises:
        RecipeError: if the rows of a step cannot be divided evenly.
    """
    parts = processes * recipe.settings.accumulate
    size, rest = divmod(recipe.batch_size, parts)
    if rest or not size:
        raise RecipeError(
            f"a step of {recipe.batch_size} rows cannot be divided among {processes} processes "
            f"that accumulate {recipe.settings.accumulate} batches each; give a multiple of {parts}"
        )
    return size


def _model(loaded: Loaded, task: str, classes: Sequence[str], recipe: FinetuneRecipe) -> nn.Module:
    """The model of the task, on the device of the pre-training model."""
    if getattr(loaded.model, REBUILT, False):
        raise UnsupportedError(
            f"{loaded.source.model} has heads or units cut out, or projections split: "
            "vlp finetune cannot train such models yet; train it in a loop of your own, see "
            "docs/structured.md"
        )
    model = downstream(
        loaded.model,
        loaded.adapter,
        task,
        tokenizer=getattr(loaded.processor, "tokenizer", None),
        classes=len(classes) or None,
        seed=recipe.settings.seed,
    )
    check_can_save(model)
    if classes:
        config: Any = model.config
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    return model


def _record(
    recipe: FinetuneRecipe,
    loaded: Loaded,
    done: Finetuned,
    masks: Masks | None,
    command: str,
    facts: Mapping[str, str],
) -> dict[str, Any]:
    return {
        **loaded.record(SCHEMA, command),
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
