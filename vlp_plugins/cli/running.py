"""What the terminal shows while a long command works, and after Ctrl-C."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from vlp_plugins.cli.program import INTERRUPTED, TERMINATED, Terminated

Progress = Callable[[int, int | None], None]


@contextmanager
def data_progress(
    *, shown: bool, what: str = "reading data", units: str = "batches"
) -> Iterator[Progress]:
    """A progress bar with the time left, on standard error; silent where nobody looks.

    Args:
        shown: whether this process speaks.
        what: is done.
        units: that are counted.
    """
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
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{units}, passed"),
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


@contextmanager
def explained_interruption(
    command: Callable[[], str], is_left: Callable[[], bool], *, speaks: bool
) -> Iterator[None]:
    """Says after Ctrl-C or SIGTERM how to go on.

    Args:
        command: the command line of this run, without `--resume`.
        is_left: whether there is something to go on from.
        speaks: whether this process does.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if speaks:
            click.echo(_how_to_go_on(command) if is_left() else _NOTHING, err=True)
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)


_NOTHING = "interrupted; nothing was written"


def _how_to_go_on(command: Callable[[], str]) -> str:
    from vlp_plugins.runtime.distributed import rank_and_size

    line = f"{command()} --resume"
    if (world := rank_and_size()[1]) > 1:  # a checkpoint is of as many processes as wrote it
        line = line.replace("vlp", f"torchrun --nproc-per-node {world} -m vlp_plugins", 1)
    return f"interrupted; to go on: {line}"


def command_line(context: click.Context, *, without: tuple[str, ...] = ("resume",)) -> str:
    """The command line of a run as somebody would write it, from what was given.

    Args:
        context: of the command.
        without: names of parameters to leave out.
    """
    words = ["vlp", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in without or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        words += _words_of(parameter, context.params[name])
    return shlex.join(words)


def _words_of(parameter: click.Parameter, value: Any) -> list[str]:
    values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
    if isinstance(parameter, click.Argument):
        return values
    option = max(parameter.opts, key=len)
    return [option] if value is True else [option, *values]
