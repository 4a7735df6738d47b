"""What the terminal shows beside the results: our warnings, and none of the libraries' chatter."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from vlp_plugins.cli.tables import visible

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
    if "transformers" in sys.modules:  # somebody runs the command from Python
        from transformers.utils import logging as chatter

        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _Lines(logging.Handler):
    """One line per record, on whatever standard error is at that moment (a progress bar's)."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(" ".join(record.getMessage().split()))
        click.echo(f"{record.levelname.lower()}: {text}", err=True)


class _Steps(logging.Handler):
    """What methods tell of their rounds and choices, as they tell it."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:  # the others are shown as warnings
            click.echo(visible(record.getMessage()), err=True)


@contextmanager
def steps_shown() -> Iterator[None]:
    """Shows what the method tells meanwhile: rounds, and the curve that it chose lambda from."""
    logger = logging.getLogger("vlp_plugins.methods")
    level, handler = logger.level, _Steps(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def show_log() -> None:
    """Warnings of ours, of plug-ins and of libraries go to standard error."""
    for logger in (logging.getLogger(), *map(logging.getLogger, _OURS)):
        for handler in [h for h in logger.handlers if isinstance(h, _Lines)]:
            logger.removeHandler(handler)
    root = logging.getLogger()
    root.addHandler(_Lines(logging.WARNING))
