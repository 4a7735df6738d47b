"""Text and tables on standard output. Nothing is cut, so that programs can read them too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.terminal import verbosity, visible

if TYPE_CHECKING:
    from vlp_plugins.masks.manifest import Count
    from vlp_plugins.masks.masks import Masks


def print_lines(lines: Iterable[object], *, err: bool = False) -> None:
    """Sentences, one a line; with `--quiet` none on standard error, where warnings go."""
    if err and verbosity() < 0:
        return
    for line in lines:
        click.echo(visible(str(line)), err=err)


def print_facts(facts: Mapping[str, object]) -> None:
    """Facts of a run with their names, one a line; with `--quiet` none."""
    if verbosity() < 0:
        return
    print_lines(f"{name}: {fact}" for name, fact in facts.items())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as they need; those of numbers are flush right."""
    cells = [[visible(str(cell).replace("\n", ", ")) for cell in row] for row in ([*header], *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numbers = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    if title:
        click.secho(f"\n{visible(title)}", bold=True)
    for row in cells:
        texts = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        click.echo("  ".join(texts).rstrip())


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


def duration(seconds: float) -> str:
    """`4.2 s`, `12.5 min` or `3.1 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit()
