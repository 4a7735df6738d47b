"""The pages that lie in the repository: they say what the cells beside them say."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers.catalogue import TABLES, Table
from benchmarks.papers.chat import CHAT, Comparison
from benchmarks.papers.findings import Found
from benchmarks.papers.levels import initial_cosines
from benchmarks.papers.pretraining import TABLE as PRETRAINING
from benchmarks.papers.rendering import page
from benchmarks.papers.views import whole
from benchmarks.results import FOLDER

OUT = FOLDER / "tables"
COMPARISONS = (CHAT, PRETRAINING)
OTHERS = ("table7", *(it.name for it in COMPARISONS))
OF_CELLS = [table for table in TABLES.values() if table.name not in OTHERS]


@pytest.mark.parametrize("table", OF_CELLS, ids=lambda table: table.name)
def test_a_page_is_what_its_cells_say(table: Table) -> None:
    found = Found(table.of(None), OUT / "cells")

    rendered = (table.view or whole)(found)

    assert (OUT / f"{table.name}.md").read_text(encoding="utf-8") == page(table, found, rendered)
    assert (OUT / f"{table.name}.svg").exists() == (rendered.figure is not None)


@pytest.mark.parametrize("it", COMPARISONS, ids=lambda it: it.name)
def test_a_page_of_comparisons_is_what_its_cells_say(it: Comparison) -> None:
    text = it.page(it.cells(it.seeds), OUT / "cells")

    assert (OUT / f"{it.name}.md").read_text(encoding="utf-8") == text


def test_how_much_is_left_of_the_weights_that_were_drawn_is_what_the_pages_say() -> None:
    recorded = json.loads((OUT / "levels.json").read_text())["cosine_with_initial_weights"]

    assert initial_cosines("xvlm") == recorded["xvlm"]
    others = [
        each for found in recorded.values() for name, each in found.items() if name != "vision"
    ]
    visions = [found["vision"] for found in recorded.values()]
    said = "before and after {:.2f} to {:.2f}, vision {:.2f} to {:.2f}"
    assert said.format(min(others), max(others), min(visions), max(visions)) in (
        OUT / "modality.md"
    ).read_text(encoding="utf-8")
