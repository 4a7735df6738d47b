"""What is written to standard error: warnings, steps, a bar; control characters are escaped."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

VERBOSITY = f"{__name__}.verbosity"
"""Key of the context's `meta`."""


def verbosity() -> int:
    """-1 for `--quiet`, 1 for `--verbose`, else 0."""
    context = click.get_current_context(silent=True)
    return 0 if context is None else int(context.meta.get(VERBOSITY, 0))


# A terminal obeys control characters, and those of the writing direction reorder what is read.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters as escapes: names and notes of files may hold any.

    Line ends and tabs stay.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_SILENCE = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bar for the weights obeys it as well
    "TRANSFORMERS_VERBOSITY": "error",  # advice to install torchvision; tables of missing keys
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",  # a line for every try to reach the hub without a network
    "TOKENIZERS_PARALLELISM": "false",
}
_OURS = ("vlp_plugins", "vlp_adapters")


def quiet_libraries() -> None:
    """To be called before transformers is imported. What the user has set stays."""
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # the command is run from Python
        from transformers.utils import logging as transformers_log

        transformers_log.set_verbosity_error()
        transformers_log.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _LineHandler(logging.Handler):
    """One line per record, on what standard error is at that moment (a progress bar's)."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(" ".join(record.getMessage().split()))
        click.echo(f"{record.levelname.lower()}: {text}", err=True)


class _StepHandler(logging.Handler):
    """What methods log of their rounds and choices, as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:  # the others are shown as warnings
            click.echo(visible(record.getMessage()), err=True)


@contextmanager
def steps_shown() -> Iterator[None]:
    """Shows what the method logs meanwhile: rounds, and the curve that it chose lambda from."""
    if verbosity():  # then it is shown with everything else, or not at all
        yield
        return
    logger = logging.getLogger("vlp_plugins.methods")
    level, handler = logger.level, _StepHandler(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def show_log() -> None:
    """Warnings of ours, of plug-ins and of libraries go to standard error.

    With `--quiet` only errors do, with `--verbose` also each step of ours.
    """
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}[verbosity()]
    for logger in (logging.getLogger(), *map(logging.getLogger, _OURS)):
        for handler in [h for h in logger.handlers if isinstance(h, _LineHandler)]:
            logger.removeHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.getLogger().addHandler(_LineHandler(level))


Progress = Callable[[int, int | None], None]


@contextmanager
def data_progress(
    *, shown: bool, what: str = "reading data", units: str = "batches"
) -> Iterator[Progress]:
    """A progress bar with the time left, on standard error; silent unless that is a terminal."""
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
    silent = not (shown and console.is_terminal) or verbosity() < 0
    with Progress(*columns, console=console, disable=silent) as bar:
        task = bar.add_task("", total=None, visible=False, start=False)

        def show(done: int, total: int | None) -> None:
            if not bar.tasks[0].started:
                bar.start_task(task)  # not before: loading the model says nothing about batches
            bar.update(task, completed=done, total=total, visible=True)

        yield show
