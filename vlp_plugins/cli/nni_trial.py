"""`vlp nni-trial`, the command of an NNI experiment's trials, and `vlp nni-best`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    option,
    read_recipe,
    recipe_options,
    test_option,
    written_options,
)
from vlp_plugins.cli.terminal import data_progress, print_table, say, steps_shown
from vlp_plugins.runtime.errors import RecipeError, UnsupportedError

_GIVEN = ParameterSource.COMMANDLINE


@click.command(
    "nni-trial",
    cls=Command,
    short_help="Run one trial of an NNI experiment.",
    examples=[
        "vlp nni-trial trial.yaml --check search.yaml",
        "vlp nni-trial trial.yaml --pairs 4 --batch-size 4",
    ],
)
@recipe_options
@test_option
@option(
    "Data", "--pairs", type=click.IntRange(min=2), metavar="N",
    standard="512, or all that are left",
    help="Number of images with captions to measure on, in whole batches.",
)  # fmt: skip
@option(
    "Measuring", "--metric", type=click.Choice(["auto", "recall", "loss"]), default="auto",
    help="What is reported: recall of retrieval, the negative pre-training loss, or 'auto': recall "
    "if the model embeds images and texts.",
)  # fmt: skip
@option(
    "Training", "--finetune-steps", type=click.IntRange(min=0), metavar="N", default=0,
    help="Number of steps of training on the pre-training loss after pruning; zeros stay zero.",
)  # fmt: skip
@option(
    "Training", "--learning-rate", type=float, metavar="NUMBER", default=1e-5,
    help="Highest learning rate of these steps.",
)  # fmt: skip
@option(
    "Training", "--report-every", type=COUNT, metavar="N", default=50,
    help="Number of such steps between two results that are reported to NNI.",
)  # fmt: skip
@option(
    "Computing", "--check", "experiment", type=PATH, metavar="FILE",
    help="Only check the experiment of this YAML file and what its trials will need. Options are "
    "taken from its trialCommand.",
)  # fmt: skip
def nni_trial(experiment: Path | None, **options: Any) -> None:
    """Run one trial of an NNI experiment: prune as the tuner says, measure, and report to NNI.

    This is the trialCommand of an experiment. What the tuner draws wins over options, and options
    win over RECIPE: `pruner` names the method, `id` (true or false) weighs layers by intrinsic
    dimension, other keys are numbers and names of a recipe (sparsity, allocation, data.batches,
    ...; no paths), finetune_steps and learning_rate, or parameters of the method. Results go to
    OUT/EXPERIMENT/TRIAL. Run by hand, outside of an experiment, it takes RECIPE and options.
    """
    with _needing_nni():
        from vlp_plugins.hosts.nni.drawn_settings import TrialSettings

        if experiment is not None:
            options = _as_trials_run(experiment, options)
        own = (each.name for each in fields(TrialSettings))
        settings = TrialSettings(**{name: options.pop(name) for name in own})
        recipe = read_recipe(**options)
        if experiment is None:
            _run(recipe, settings)
            return
        from vlp_plugins.hosts.nni.search import check_experiment

        found = check_experiment(experiment, recipe, settings)
        say(f"ok: {found.draws} draws tried, pruners {', '.join(found.methods)}")


@click.command(
    "nni-best",
    cls=Command,
    short_help="Copy the best trial of an NNI experiment.",
    examples=["vlp nni-best trials --min-sparsity 0.7 --out best"],
)
@click.argument("folder", type=PATH)
@written_options
@option(
    "Measuring", "--min-sparsity", type=click.FloatRange(0, 1), metavar="FRACTION", standard="0",
    help="Leave out trials that remove less than this fraction of the weights, such as 0.7.",
)  # fmt: skip
def nni_best(folder: Path, target: Path, overwrite: bool, min_sparsity: float | None) -> None:
    """Copy masks, recipe and report of the best trial to --out.

    FOLDER is that of the experiment: OUT/EXPERIMENT, where the recipe of its trials says OUT, or
    OUT itself if it holds one experiment. NNI need not run.
    """
    with _needing_nni():
        from vlp_plugins.hosts.nni.best import best_trial, export_trial, finished_trials
        from vlp_plugins.hosts.nni.drawn_settings import flattened

        trials = finished_trials(folder)
        best = best_trial(trials, min_sparsity=min_sparsity)
        export_trial(best, target, overwrite=overwrite)
    print_table(
        "",
        ["trial", "method", "sparsity", "drawn", f"result ({best.record.metric})"],
        [
            [
                f"{trial.record.trial}{' *' if trial is best else ''}",
                trial.record.method,
                f"{trial.record.sparsity:.4%}",
                ", ".join(f"{key} {value}" for key, value in flattened(trial.record.drawn).items()),
                f"{trial.value:.4f}",
            ]
            for trial in trials
        ],
    )
    click.echo(f"written: {target}, of trial {best.record.trial}")


def _as_trials_run(experiment: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options of the experiment's own trialCommand, and above them those given here."""
    from vlp_plugins.hosts.nni.search import trial_words
    from vlp_plugins.jobs.recipes import find_recipe

    found = trial_words(experiment)
    if found is None:
        return options
    words, folder = found
    try:
        of_trials = nni_trial.make_context("nni-trial", words).params
    except click.ClickException as error:
        raise RecipeError(f"{experiment.name}: trialCommand: {error.format_message()}") from error
    if of_trials["recipe"] is not None:
        of_trials["recipe"] = find_recipe(of_trials["recipe"], folder)
    here = click.get_current_context()
    given = (name for name in options if here.get_parameter_source(name) is _GIVEN)
    return {name: of_trials[name] for name in options} | {name: options[name] for name in given}


def _run(recipe: Any, settings: Any) -> None:
    from vlp_plugins.hosts.nni.trial import NniTrial, folder_of, run_trial
    from vlp_plugins.jobs.metrics import title_of

    trial = NniTrial.current()
    if trial.alone:
        say("no NNI experiment: nothing is drawn, RECIPE and options decide", err=True)
    with data_progress(shown=sys.stderr.isatty()) as progress, steps_shown():
        record = run_trial(recipe, settings, trial, progress=progress)
    print_table(
        "",
        ["steps of fine-tuning", *map(title_of, record.final)],
        [
            [step, *(f"{figure:.4f}" for figure in figures.values())]
            for step, figures in record.results.items()
        ],
    )
    say(f"\n{record.method}: {record.sparsity:.4%} of the prunable weights are removed")
    click.echo(f"written: {folder_of(recipe, trial)}")


@contextmanager
def _needing_nni() -> Iterator[None]:
    """The host is imported by its name here only; without NNI it says what to install."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(str(error)) from error
