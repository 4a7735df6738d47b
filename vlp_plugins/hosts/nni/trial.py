"""One trial of an NNI experiment: prunes as drawn, measures, fine-tunes, reports, keeps masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlp_plugins.hosts.nni.experiment import Trial
from vlp_plugins.hosts.nni.finetuning import check_finetuning, finetune
from vlp_plugins.hosts.nni.metrics import Yardstick, check_test, measured_batches
from vlp_plugins.hosts.nni.overlay import TrialSettings, overlay
from vlp_plugins.hosts.nni.record import TrialRecord
from vlp_plugins.jobs.preparation import Prepared
from vlp_plugins.jobs.prune import delete_checkpoints, run
from vlp_plugins.jobs.recipes import Recipe, need
from vlp_plugins.jobs.work_dir import delete_work
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.saving import check_can_save, write_model

FINETUNED = "model-finetuned"
"""The folder of the fine-tuned model, beside those of a recipe with `save_model`."""


def run_trial(
    recipe: Recipe,
    settings: TrialSettings,
    trial: Trial,
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> TrialRecord:
    """Prunes with the job of `vlp prune`, so that the masks are those that it makes.

    The folder `OUT/EXPERIMENT/TRIAL` holds what `vlp prune` writes and `trial.json`, whole or not
    at all. The tuner is told the final result when the folder is there. With `save_model` the
    fine-tuned model is written, too.

    Args:
        recipe: of all trials; its `out` is the folder of the experiments.
        settings: of all trials.
        trial: what was drawn, and whom to tell.
        progress: called with (batches done, batches in all or None) of the data pass.

    Returns:
        What `trial.json` holds.

    Raises:
        VlpError: with one line that says what to do; NNI counts the trial as failed.
    """
    need(recipe, "model", "out")
    drawn, settings = overlay(recipe, settings, trial.drawn)
    check_test(drawn, settings)
    check_finetuning(drawn, settings)
    out = folder_of(recipe, trial)
    ending = _Ending(settings, trial)
    try:
        run(replace(drawn, out=str(out)), progress=progress, finish=ending)
    except BaseException:  # nobody goes on with a trial: the next one has another name
        delete_checkpoints(out)
        delete_work(out)
        raise
    assert ending.record is not None
    trial.final(ending.record.final)
    return ending.record


def folder_of(recipe: Recipe, trial: Trial) -> Path:
    """Where a trial keeps what it makes."""
    out = os.path.abspath(str(recipe.out))  # noqa: PTH100  resolve() would follow links
    return Path(out) / trial.experiment / trial.name


@dataclass
class _Ending:
    """What a trial does with the masks, in the folder that becomes its own."""

    settings: TrialSettings
    trial: Trial
    record: TrialRecord | None = None

    def __call__(self, job: Prepared, masks: Mapping[str, Masks], folder: Path) -> None:
        ((title, each),) = masks.items()
        yardstick = Yardstick(job, measured_batches(job, self.settings), self.settings.metric)
        results: dict[int, dict[str, float]] = {}

        def told(step: int) -> None:
            results[step] = yardstick.measure()
            self.trial.intermediate(results[step])

        each.apply(job.model, job.adapter)
        told(0)
        if self.settings.finetune_steps:
            finetune(job, each, job.batches(), self.settings, told)
            if job.recipe.save_model:
                check_can_save(job.model)
                write_model(job.model, folder / FINETUNED, source=job.recipe.model)
        self.record = TrialRecord(
            self.trial.experiment,
            self.trial.name,
            self.trial.number,
            dict(self.trial.drawn),
            asdict(self.settings),
            job.recipe.method,
            title,
            each.sparsity,
            yardstick.metric,
            results,
        )
        self.record.save(folder)
