"""Writes a table's page and its plot from the files of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.papers.about import chance, commands, missing, settings
from benchmarks.papers.catalogue import Table
from benchmarks.papers.findings import Found
from benchmarks.papers.views import Rendered, whole
from vlp_plugins.atomic import write_text
from vlp_plugins.report.drawing import svg_of


def render(table: Table, seeds: Sequence[int] | None, cells: Path, out: Path) -> str:
    """Writes `NAME.md` and `NAME.svg` and returns the Markdown.

    Args:
        table: its own view, or `whole`.
        seeds: over which figures are means; None: those of the table.
        cells: folder of the cells' files.
        out: folder to write to.
    """
    found = Found(table.of(seeds), cells)
    rendered = (table.view or whole)(found)
    if rendered.figure is None:
        (out / f"{table.name}.svg").unlink(missing_ok=True)  # of another time
    else:
        write_text(out / f"{table.name}.svg", svg_of(rendered.figure), overwrite=True)
    text = page(table, found, rendered)
    write_text(out / f"{table.name}.md", text, overwrite=True)
    return text


def page(table: Table, found: Found, rendered: Rendered) -> str:
    """The Markdown: what was done, what is missing, then the figures."""
    lines = [f"# {table.title}", "", *commands(table, found), ""]
    if found.cells:
        for paragraph in (settings(found), *chance(found), missing(found)):
            lines += [paragraph, ""]
    if rendered.figure is not None:
        lines += [f"![{table.title}]({table.name}.svg)", ""]
    return "\n".join([*lines, *rendered.lines]).rstrip() + "\n"
