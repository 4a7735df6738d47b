"""`vlp prune`: the main job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import ManyValues, read_recipe, recipe_options
from vlp_plugins.cli.program import INTERRUPTED
from vlp_plugins.cli.quiet import steps_shown
from vlp_plugins.cli.tables import print_masks

if TYPE_CHECKING:
    from vlp_plugins.recipes import Recipe

Progress = Callable[[int, int | None], None]


@click.command(cls=ManyValues)
@recipe_options
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
def prune(resume: bool, **options: Any) -> None:
    """Prunes as RECIPE and options say: masks, layers.csv and report.html in --out.

    An option wins over the recipe's key. Under torchrun the processes share the data pass:
    torchrun --nproc-per-node 2 -m vlp_plugins prune ...
    """
    from vlp_plugins.calibration.processes import place
    from vlp_plugins.job import run
    from vlp_plugins.launch import process_group

    recipe = read_recipe(**options)
    with process_group():
        speaks = place()[0] == 0
        with (
            _interruption(recipe, speaks=speaks),
            data_progress(shown=speaks) as progress,
            steps_shown() if speaks else nullcontext(),
        ):
            result = run(recipe, progress=progress, resume=resume)
    if not speaks:
        return
    print_masks(result.masks)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo()
    for name, value in result.facts.items():
        click.echo(f"{name}: {value}")
    click.echo(f"written: {result.out}")


@contextmanager
def _interruption(recipe: Recipe, *, speaks: bool) -> Iterator[None]:
    """Says after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if speaks:
            click.echo(_how_to_go_on(recipe), err=True)
        sys.exit(INTERRUPTED)


def _how_to_go_on(recipe: Recipe) -> str:
    from vlp_plugins.calibration.processes import place
    from vlp_plugins.job import leftovers
    from vlp_plugins.recipes import command_of

    if not recipe.out or not leftovers(Path(recipe.out)):
        return "interrupted; nothing was written"
    command = f"{command_of(recipe)} --resume"
    if (world := place()[1]) > 1:  # a checkpoint is of as many processes as wrote it
        command = command.replace("vlp", f"torchrun --nproc-per-node {world} -m vlp_plugins", 1)
    return f"interrupted; to go on: {command}"


@contextmanager
def data_progress(*, shown: bool) -> Iterator[Progress]:
    """A progress bar with the time left, on standard error; silent where nobody looks."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("reading data"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, passed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    silent = not (shown and console.is_terminal)
    with Progress(*columns, console=console, disable=silent) as bar:
        task = bar.add_task("", total=None, visible=False, start=False)

        def show(done: int, total: int | None) -> None:
            if not bar.tasks[0].started:
                bar.start_task(task)  # not before: loading the model says nothing about batches
            bar.update(task, completed=done, total=total, visible=True)

        yield show
