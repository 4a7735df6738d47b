"""What is printed: text and tables on standard output; warnings, steps and a bar on standard error.

Tables are as wide as the terminal, and nothing is cut. Control characters are escaped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vlp_plugins.masks.manifest import Count
    from vlp_plugins.masks.masks import Masks


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


SCHEMA = 1
"""Of what `--json` prints; a field that goes or changes its meaning adds 1."""
_NUMBER = re.compile(r"\d\S*( \S{1,3})?")  # perhaps with a unit
_NARROWEST = 12
"""Columns of text are not made narrower to fit."""


def print_lines(lines: Iterable[object], *, err: bool = False, indent: str = "  ") -> None:
    """Sentences; the lines that continue one are indented.

    On standard error, where warnings go, each stays on one line, for programs to find it; with
    `--quiet` there are none.
    """
    if err and verbosity() < 0:
        return
    for line in lines:
        text = visible(str(line))
        parts = (
            [text]
            if err
            else [part for each in text.splitlines() for part in _fitting(each, indent)]
        )
        for part in parts or [""]:
            click.echo(part, err=err)


def say(sentence: object = "", *, err: bool = False, indent: str = "  ") -> None:
    """One of `print_lines`."""
    print_lines((sentence,), err=err, indent=indent)


def print_facts(facts: Mapping[str, object]) -> None:
    """Facts of a run with their names, one a line; with `--quiet` none."""
    if verbosity() < 0:
        return
    print_lines(f"{name}: {fact}" for name, fact in facts.items())


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    names: bool = False,
    most: int | None = None,
) -> None:
    """Columns as wide as they need; those of numbers are flush right.

    Text is broken into several lines where the table would be wider than the terminal, or than
    `most` characters; nothing is cut. If the first column holds `names`, which people copy, it is
    not broken.
    """
    cells = [[visible(str(cell).replace("\n", ", ")) for cell in row] for row in ([*header], *rows)]
    numbers = [
        all(not row[i] or _NUMBER.fullmatch(row[i]) for row in cells[1:])
        for i in range(len(header))
    ]
    widths = _widths(cells, numbers, min(columns(), most or columns()), names=names)
    if title:
        click.secho(f"\n{visible(title)}", bold=True)
    for row in cells:
        parts = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*parts, fillvalue=""):
            texts = (
                text.rjust(width) if number else text.ljust(width)
                for text, width, number in zip(line, widths, numbers, strict=True)
            )
            click.echo("  ".join(texts).rstrip())


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document: what is not finite is null, what JSON does not know is text."""
    document = {"schema": SCHEMA, **document}
    text = json.dumps(_finite(document), indent=1, allow_nan=False, default=str)
    click.echo(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns() -> int:
    """Width of the terminal, or what COLUMNS says; 80 where neither is known."""
    return shutil.get_terminal_size().columns


def _widths(
    cells: Sequence[Sequence[str]], numbers: Sequence[bool], room: int, *, names: bool = False
) -> list[int]:
    """What each column needs; titles over numbers and what few rows need give way until all fit."""
    usual = [sum(map(len, column)) / len(column) for column in zip(*cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    least = [
        max(map(len, (*head.split(), *column))) if number else min(width, _NARROWEST)
        for (head, *column), width, number in zip(
            zip(*cells, strict=True), widths, numbers, strict=True
        )
    ]
    if names:
        least[0] = widths[0]
    while sum(widths) + 2 * (len(widths) - 1) > room:
        spare = [i for i, width in enumerate(widths) if width > least[i]]
        if not spare:
            break
        widths[max(spare, key=lambda i: (numbers[i], widths[i] / (1 + usual[i])))] -= 1
    return widths


def _broken(text: str, width: int) -> list[str]:
    """The text in lines: broken after a space, and in longer words after a dot, slash or hyphen."""
    pieces = [text]
    for ends in " ", "[./_,-]":
        pieces = [
            part
            for piece in pieces
            for part in (re.split(f"(?<={ends})", piece) if len(piece) > width else [piece])
        ]
    lines = [""]
    for piece in pieces:
        if len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines if line] or [""]


def _fitting(line: str, indent: str) -> list[str]:
    """A sentence in lines no wider than the terminal; words are kept whole."""
    return textwrap.wrap(
        line, columns(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False, drop_whitespace=True,
    ) or [""]  # fmt: skip


def print_masks(masks: Mapping[str, Masks]) -> None:
    """Sparsity and kept elements per modality, one row per mask set and modality."""
    counts = {title: each.counts() for title, each in masks.items()}
    print_counts({title: {**c.by_modality, "all": c.all} for title, c in counts.items()})


def print_counts(counts: Mapping[str, Mapping[str, Count]]) -> None:
    """Sparsity and kept elements, one row per title and group."""
    rows = []
    for title, groups in counts.items():
        for name, count in groups.items():
            removed, kept = f"{count.removed:,}", f"{count.kept:,}"
            rows.append([title, name, f"{count.sparsity:.4%}", removed, kept])
    print_table("", ["target", "modality", "sparsity", "removed", "kept"], rows)


def counts_record(counts: Mapping[str, Count]) -> dict[str, Any]:
    """Counts as JSON has them, by modality and under `all`."""
    return {
        "counts": {
            name: {"sparsity": c.sparsity, "removed": c.removed, "kept": c.kept, "total": c.total}
            for name, c in counts.items()
        }
    }
