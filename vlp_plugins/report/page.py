"""report.html: a single file that needs neither a network nor other files.

Every page has the same order: what was done, the figures that matter, warnings, what to do next;
then pictures and tables, the command that repeats it, the files next to it, and facts of the run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlp_plugins.report.drawing import HEIGHT, WIDTH, Chart, HeatMap
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.numbers import percent, size
from vlp_plugins.runtime.version import __version__

_FILES = {
    "masks*.safetensors": "masks: which weights stay; for vlp masks, evaluate and finetune",
    "config.json": "what the model is made of",
    "model-*": "pruned model",
    "model*.safetensors": "weights of the model",
    "recipe.yaml": "all settings; vlp prune runs it again",
    "layers.csv": "the table of layers, for a spreadsheet",
    "statistics.safetensors": "what was gathered from the data; --statistics reuses it",
    "id-profile.json": "intrinsic dimensions; --id-profile reuses them",
    "evaluation.json": "all metrics and settings",
    "said.jsonl": "what the model wrote, example by example",
    "sensitivity.json": "all results and settings",
    "points.csv": "every point that was measured, for a spreadsheet",
    "finetuning.json": "all settings and results",
    "trial.json": "what was drawn and measured",
    "losses.jsonl": "the loss, step by step",
    "masks": "the masks of every method at every sparsity",
    "compare.csv": "all figures, for a spreadsheet",
    "compare.json": "all figures and settings",
}
"""What the files next to a page are, by the pattern of their names."""


@dataclass(frozen=True)
class Tile:
    """A figure of the first screen: what it is, its value, a short remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Step:
    """Something to do next: what it does, and the exact command."""

    text: str
    command: str


class FileLink(str):
    """A cell of a table that links to a file or folder next to the page, by its name."""

    __slots__ = ()
    is_link = True


@dataclass(frozen=True)
class Table:
    """A table with a title and a sentence that says how to read it; a click on a heading sorts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numbers(self) -> set[int]:
        """The columns that are flush right: every cell is a number, or empty."""
        return {
            column
            for column in range(len(self.header))
            if self.rows and all(_is_number(row[column]) for row in self.rows)
        }


def _is_number(cell: str) -> bool:
    return cell.strip().lstrip("+-").replace(".", "", 1)[:1].isdigit()


@dataclass(frozen=True)
class Section:
    """A part of a page: charts, heat maps and tables under one heading.

    Attributes:
        note: how to read it.
        maps: in order, next to each other where there is room.
        folded: only the heading is shown until a click opens it.
    """

    title: str
    note: str = ""
    charts: Sequence[Chart] = ()
    maps: Sequence[HeatMap] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        command: the exact command that repeats the run.
        lead: what was done, in one sentence.
        findings: what the figures say, a sentence each.
        facts: short facts by name: data, time, memory.
    """

    title: str
    command: str
    lead: str
    tiles: Sequence[Tile] = ()
    warnings: Sequence[str] = ()
    findings: Sequence[str] = ()
    steps: Sequence[Step] = ()
    sections: Sequence[Section] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def made_by(self) -> str:
        """The first two words of the command, and the version."""
        return f"Report of {' '.join(self.command.split()[:2])} \u00b7 vlp-plugins {__version__}"


def write_page(page: Page, folder: Path) -> None:
    """Writes `report.html` into a folder, with links to what is in the folder already.

    Raises:
        UnsupportedError: if the package of the extra `report` is missing.
    """
    text = render(page, folder)
    (folder / "report.html").write_text(text, encoding="utf-8")


def render(page: Page, folder: Path | None = None) -> str:
    """A page as text, with links to the files of a folder next to it.

    Raises:
        UnsupportedError: if the package of the extra `report` is missing.
    """
    check_can_render()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = _text("page.css"), _text("page.js")
    # The browser runs and applies exactly these texts, and nothing from a name or a note.
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    facts = Table("About this run", ("fact", "value"), [list(item) for item in page.facts.items()])
    return environment.from_string(_text("page.html.j2")).render(
        page=page, facts=facts, files=_files(folder), policy=policy, style=style, script=script,
        version=__version__, width=WIDTH, height=HEIGHT, percent=percent,
    )  # fmt: skip


def check_can_render() -> None:
    """Raises `UnsupportedError` if the package of the extra `report` is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "report.html is left out: it needs jinja2 (pip install 'vlp-plugins[report]')"
        ) from error


def _text(name: str) -> str:
    return files("vlp_plugins.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _files(folder: Path | None) -> Table:
    """Name, kind and size of what is in the folder, hidden and temporary files left out."""
    found = [] if folder is None else sorted(folder.iterdir())
    rows = [
        [
            FileLink(path.name),
            next((what for pattern, what in _FILES.items() if fnmatch(path.name, pattern)), ""),
            size(_bytes(path)),
        ]
        for path in found
        if not path.name.startswith(".") and path.name != "report.html"
    ]
    return Table("Files", ("file", "what it is", "size"), rows)


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def span(values: Sequence[str]) -> str:
    """Values of several mask sets in little room: the first and the last, if they differ."""
    return values[0] if len(set(values)) == 1 else f"{values[0]} to {values[-1]}"


def value_text(value: Any) -> str:
    """A value as text; lists of pairs, such as curves, as `a: b`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {value_text(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        pairs = value and all(isinstance(each, (list, tuple)) and len(each) == 2 for each in value)
        inner = (
            (f"{value_text(a)}: {value_text(b)}" for a, b in value)
            if pairs
            else map(value_text, value)
        )
        return ("; " if pairs else ", ").join(inner)
    return str(value)
