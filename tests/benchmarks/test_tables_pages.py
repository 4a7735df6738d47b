"""The pages that lie in the repository: they say what the cells beside them say."""

from __future__ import annotations

import pytest

from benchmarks.results import FOLDER
from benchmarks.tables.catalogue import TABLES, Table
from benchmarks.tables.findings import Found
from benchmarks.tables.rendering import page
from benchmarks.tables.views import whole

OUT = FOLDER / "tables"
OF_CELLS = [table for table in TABLES.values() if table.name != "table7"]


@pytest.mark.parametrize("table", OF_CELLS, ids=lambda table: table.name)
def test_a_page_is_what_its_cells_say(table: Table) -> None:
    found = Found(table.of(None), OUT / "cells")

    rendered = (table.view or whole)(found)

    assert (OUT / f"{table.name}.md").read_text(encoding="utf-8") == page(table, found, rendered)
    assert (OUT / f"{table.name}.svg").exists() == (rendered.figure is not None)
