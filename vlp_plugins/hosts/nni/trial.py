"""One trial of an NNI experiment: prunes as drawn, measures, fine-tunes, reports, keeps masks."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import nni
import torch
from torch import nn

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.data.sources import open_source
from vlp_plugins.hosts.nni.best import TrialRecord
from vlp_plugins.hosts.nni.drawn_settings import PAIRS, Metric, TrialSettings, overlay
from vlp_plugins.jobs.preparation import Prepared, batches_for
from vlp_plugins.jobs.prune import delete_checkpoints, run
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, need
from vlp_plugins.jobs.work_dir import delete_work
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch, RetrievalAdapter
from vlp_plugins.models.restricted import DelegatingAdapter
from vlp_plugins.models.saving import check_can_save, write_model
from vlp_plugins.report.page import Tile
from vlp_plugins.runtime.errors import DataError, NonFiniteError, RecipeError, UnsupportedError
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings
from vlp_plugins.tasks.retrieval import retrieval

_log = logging.getLogger(__name__)

STANDALONE = "STANDALONE"
"""The id that NNI gives to the experiment and the trial of a script run by hand."""


@dataclass
class NniTrial:
    """The trial that NNI started; outside of an experiment one to which nothing was given.

    Without an experiment NNI itself is in its stand-alone mode: it draws nothing, and shows results
    in the log.

    Attributes:
        drawn: by key what the tuner chose.
    """

    experiment: str
    name: str
    number: int
    drawn: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def current(cls) -> NniTrial:
        """Asks NNI, once in a process."""
        if nni.get_trial_id() == STANDALONE:
            return cls(STANDALONE, STANDALONE, 0)
        warn_of_portal()
        drawn = nni.get_next_parameter() or {}
        return cls(nni.get_experiment_id(), nni.get_trial_id(), nni.get_sequence_id(), drawn)

    @property
    def alone(self) -> bool:
        """Whether there is no experiment."""
        return self.name == STANDALONE

    def intermediate(self, result: Mapping[str, float]) -> None:
        """Reports how good the model is so far; `default` is what tuners look at."""
        nni.report_intermediate_result(dict(result))

    def final(self, result: Mapping[str, float]) -> None:
        """Reports how good the model is in the end."""
        nni.report_final_result(dict(result))


@cache
def warn_of_portal() -> None:
    """Warns once in a process that the experiment can be reached; NNI itself does not."""
    _log.warning(
        "NNI's portal listens on all network interfaces and asks for no password: anyone who "
        "reaches its port can read and change the experiment; keep others from it by a firewall or "
        "a network namespace (see docs/nni.md)"
    )


DEFAULT = "default"
"""The value that tuners look at; here the higher, the better."""


def check_test(
    recipe: Recipe,
    settings: TrialSettings,
    opened: Callable[[str, DataRecipe], CaptionSource] | None = None,
) -> None:
    """Makes sure that there are pairs to measure on, before the work.

    `opened` opens a source, for checks of several trials on the same data.

    Raises:
        RecipeError: if neither recipe nor settings say where they come from.
        DataError: if there are none, or fewer than the settings ask for.
    """
    data = recipe.data
    if settings.test is None:
        need(recipe, "data.source")
        if data.batches is None:
            raise RecipeError(
                "the recipe may read all of its data, and what is read is not measured on: give "
                "--test FOLDER, or the recipe's `data: {batches: ...}`"
            )
    source = (opened or source_of)(str(settings.test or data.source), data)
    read = 0 if settings.test is not None or data.batches is None else data.batches
    left = None if source.length is None else source.length - read * data.batch_size
    if left is not None and left < 2:
        raise _nothing_left(data)
    if left is not None and settings.pairs is not None and left < settings.pairs:
        after = f" after the {read} batches of {data.batch_size} that are read" if read else ""
        raise DataError(
            f"{source.description} has {left} pairs{after}, and --pairs asks for {settings.pairs}; "
            f"give --pairs {left}, --test FOLDER, or fewer batches"
        )


def source_of(source: str, data: DataRecipe) -> CaptionSource:
    """Opens the pairs at a place, with the columns and the split of a recipe.

    Raises:
        DataError: if there are none.
    """
    return open_source(
        source,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
    )


def measured_batches(job: Prepared, settings: TrialSettings) -> list[Batch]:
    """The batches that are measured on; none of them is read for pruning or fine-tuning.

    Raises:
        DataError: if there are none.
    """
    data = job.recipe.data
    wanted = -(-(settings.pairs or PAIRS) // data.batch_size)
    source, skipped = settings.test, 0
    if source is None:
        source, skipped = str(data.source), data.batches or 0
    data = replace(data, batches=skipped + wanted)
    read = batches_for(source, data, job.processor(), job.adapter, job.model)
    found = list(islice(read, skipped, None))
    if not found:
        raise _nothing_left(job.recipe.data)
    return found


def _nothing_left(data: DataRecipe) -> DataError:
    return DataError(
        f"{data.source} has no pairs after the {data.batches} batches of {data.batch_size} that "
        "the recipe reads, so there is nothing to measure on; give --test FOLDER, or fewer batches"
    )


def measure(job: Prepared, batches: Sequence[Batch], metric: Metric) -> dict[str, float]:
    """Figures of a job's model by name; `default` is what a tuner makes as high as it can.

    Recall in percent at 1, 5 and 10 both ways, of which `default` is the mean; or the mean of the
    batches' loss, of which `default` is the negative. The model is left as it is found.

    Raises:
        UnsupportedError: if the family does not embed images and texts, or has no loss.
        NonFiniteError: if the loss is NaN or infinite, which no tuner can read.
    """
    if metric == "recall":
        named = retrieval(job.model, job.adapter, batches).final.as_dict()
        return {DEFAULT: named.pop("mean"), **named}
    with LossProbe(job.model, job.adapter, job.weights).attached(()) as probe:
        losses = [probe.loss(batch, index) for index, batch in enumerate(batches)]
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss of the pruned model is {loss}, which is not a result that a tuner could "
            "compare; the trial counts as failed: search lower sparsities or learning rates"
        )
    return {DEFAULT: -loss, "loss": loss}


def check_finetuning(recipe: Recipe, settings: TrialSettings) -> None:
    """Makes sure that the model can be fine-tuned, before the work.

    Raises:
        RecipeError: if there is no data, or a number is out of range.
        UnsupportedError: for a precision in which small steps are lost.
    """
    if not settings.finetune_steps:
        return
    need(recipe, "data.source")
    if settings.learning_rate <= 0:
        raise RecipeError(f"the learning rate must be above 0, not {settings.learning_rate:g}")
    if recipe.dtype not in ("auto", "float32") or recipe.autocast == "float16":
        raise UnsupportedError(
            "fine-tuning takes weights in float32, in which small steps are not lost, and of "
            "autocast only bfloat16; leave --dtype out and give --autocast bfloat16 if need be"
        )


class _OwnLosses(DelegatingAdapter):
    """Trains a model of any task on its own losses."""

    def task_losses(self, task: str, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return self.losses(model, batch)


def fine_tuned(
    job: Prepared, masks: Masks, settings: TrialSettings, report: Callable[[int], None]
) -> None:
    """Trains a job's model by `finetune`, at one rate, on the batches that the recipe reads.

    Zeros of the masks stay. `report` is called with the number of steps done after every
    `report_every` and the last.

    Raises:
        VlpError: see `vlp_plugins.tasks.finetuning.finetune.finetune`.
    """

    def stepped(step: int, steps: int) -> None:
        if step % settings.report_every == 0 or step == steps:
            report(step)

    how = FinetuneSettings(
        settings.learning_rate, weight_decay=_WEIGHT_DECAY, schedule="constant",
        steps=settings.finetune_steps, autocast=job.recipe.autocast, seed=job.recipe.seed,
    )  # fmt: skip
    finetune(
        job.model, _OwnLosses(job.adapter), job.batches(), task="pretraining", masks=masks,
        settings=how, log_every=1, progress=stepped,
    )  # fmt: skip


_WEIGHT_DECAY = 0.01
"""That of torch's AdamW."""
FINETUNED = "model-finetuned"
"""The folder of the fine-tuned model, next to those of a recipe with `save_model`."""


def run_trial(
    recipe: Recipe,
    settings: TrialSettings,
    trial: NniTrial,
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> TrialRecord:
    """Prunes with the job of `vlp prune`, so that the masks are those that it makes.

    The folder `OUT/EXPERIMENT/TRIAL` holds what `vlp prune` writes and `trial.json`, whole or not
    at all; OUT is the recipe's. The tuner gets the final result when the folder is there. With
    `save_model` the fine-tuned model is written, too. Progress is that of the data pass.

    Returns:
        What `trial.json` holds.

    Raises:
        VlpError: NNI counts the trial as failed.
    """
    need(recipe, "model", "out")
    drawn, settings = overlay(recipe, settings, trial.drawn)
    check_test(drawn, settings)
    check_finetuning(drawn, settings)
    if settings.finetune_steps:
        drawn = replace(drawn, dtype="float32")
    out = folder_of(recipe, trial)
    records = []

    def finish(job: Prepared, masks: Mapping[str, Masks], folder: Path) -> list[Tile]:
        records.append(_finish(job, masks, folder, settings, trial))
        return quality_of(records[0])

    try:
        run(replace(drawn, out=str(out)), progress=progress, finish=finish)
    except BaseException:  # a trial is never resumed: the next one has another name
        delete_checkpoints(out)
        delete_work(out)
        raise
    (record,) = records
    trial.final(record.final)
    return record


def quality_of(record: TrialRecord) -> list[Tile]:
    """What a trial has measured, after pruning and after fine-tuning, for its report."""
    name, digits, unit = ("Loss", 4, "") if record.metric == "loss" else ("Mean recall", 1, "%")
    values = [abs(record.results[step][DEFAULT]) for step in sorted(record.results)]
    first, last = (f"{value:.{digits}f}{unit}" for value in (values[0], values[-1]))
    if len(values) == 1:
        return [Tile(name, first, "after pruning, not fine-tuned")]
    note = f"after pruning, and after {max(record.results):,} steps of fine-tuning"
    return [Tile(name, f"{first} \u2192 {last}", note)]


def folder_of(recipe: Recipe, trial: NniTrial) -> Path:
    """Where a trial keeps what it makes."""
    out = os.path.abspath(str(recipe.out))  # noqa: PTH100  resolve() would follow links
    return Path(out) / trial.experiment / trial.name


def _finish(
    job: Prepared,
    masks: Mapping[str, Masks],
    folder: Path,
    settings: TrialSettings,
    trial: NniTrial,
) -> TrialRecord:
    """Measures and fine-tunes with the masks; writes to the folder that becomes the trial's."""
    ((title, each),) = masks.items()
    batches = measured_batches(job, settings)
    metric = settings.metric
    if metric == "auto":
        metric = "recall" if isinstance(job.adapter, RetrievalAdapter) else "loss"
    results: dict[int, dict[str, float]] = {}

    def report(step: int) -> None:
        results[step] = measure(job, batches, metric)
        trial.intermediate(results[step])

    each.apply(job.model, job.adapter)
    report(0)
    if settings.finetune_steps:
        fine_tuned(job, each, settings, report)
        if job.recipe.save_model:
            check_can_save(job.model)
            write_model(job.model, folder / FINETUNED, source=job.recipe.model)
    record = TrialRecord(
        trial.experiment,
        trial.name,
        trial.number,
        dict(trial.drawn),
        asdict(settings),
        job.recipe.method,
        title,
        each.sparsity,
        metric,
        results,
    )
    record.save(folder)
    return record
