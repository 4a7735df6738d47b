"""Rows as comma-separated text that spreadsheets may open."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Comma-separated text, one line per row.

    A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` as a formula: unless it is a
    number, it gets an apostrophe in front, as names of weights may be anything.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _cell(cell: object) -> object:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
