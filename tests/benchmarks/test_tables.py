"""Tables of pruned and fine-tuned models: their cells, what a file keeps, and how they are run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.papers import __main__ as command
from benchmarks.papers import running
from benchmarks.papers.catalogue import TABLES, grid
from benchmarks.papers.cell import Cell
from benchmarks.papers.running import missing, run, unique
from benchmarks.papers.tuning import TUNINGS
from benchmarks.papers.ways import PAPER, WAYS
from benchmarks.papers.world import World
from vlp_plugins.runtime.errors import DataError, OutputError

ALL = [cell for seed in (1, 2) for table in TABLES.values() for cell in table.cells(seed)]


class Written(Cell):
    """A cell that does no work: it writes what it is, or fails if it is to be pruned at random."""

    def run(self, world: World, out: Path) -> None:
        if self.way is not None and self.way.name == "random":
            raise DataError("the data is not there; put it there")
        path = self.path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.identity()))


def written(*names: str) -> list[Cell]:
    return [Written("blip", "retrieval", WAYS[name], 0.63) for name in names]


class Hanging(Cell):
    """A cell that does not end."""

    def run(self, world: World, out: Path) -> None:
        time.sleep(600)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """One that has been made; nothing reads it."""
    made = World(tmp_path / "world")
    made.downstream.mkdir(parents=True)
    Path(made.calibration).mkdir(parents=True)
    return made


def test_cells_of_one_name_are_the_same_whatever_table_asks_for_them() -> None:
    known: dict[str, dict[str, Any]] = {}
    for cell in ALL:
        assert known.setdefault(cell.name, cell.identity()) == cell.identity()
    assert len(known) == len(unique(ALL)) < len(ALL)


def test_names_differ_where_what_decides_the_figures_does() -> None:
    identities = {json.dumps(cell.identity(), sort_keys=True) for cell in unique(ALL)}

    assert len(identities) == len(unique(ALL))


def test_every_cell_has_a_recipe_and_every_way_one_name() -> None:
    assert all((cell.model, cell.task) in TUNINGS for cell in ALL)
    assert all(name == way.name for name, way in WAYS.items())


def test_the_main_table_is_whole() -> None:
    cells = TABLES["main"].cells(1)

    wanted = {
        (model, task, way.name, sparsity)
        for model in ("blip", "xvlm")
        for task in ("retrieval", "captioning", "vqa")
        for way in PAPER
        for sparsity in (0.63, 0.75, 0.9)
    }
    there = {(c.model, c.task, c.way.name, c.sparsity) for c in cells if c.way is not None}
    assert wanted <= there
    assert sum(cell.way is None for cell in cells) == 6


def test_a_dense_model_is_asked_for_once() -> None:
    assert [cell.sparsity for cell in grid([None], 1, models=["blip"], tasks=["vqa"])] == [0.0]


def test_a_file_of_other_settings_is_refused_and_named(tmp_path: Path) -> None:
    (cell,) = written("omp")
    assert cell.content(tmp_path) is None
    cell.path(tmp_path).parent.mkdir(parents=True)
    cell.path(tmp_path).write_text(json.dumps({**cell.identity(), "tuning": {"steps": 1}}))

    with pytest.raises(OutputError, match=r"other settings \(tuning\)"):
        cell.content(tmp_path)
    with pytest.raises(OutputError, match="move it away"):
        missing([cell], tmp_path)


def test_what_is_there_is_not_run_again_and_the_rest_goes_on_after_a_failure(
    tmp_path: Path, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = written("omp", "random", "lamp", "omp")
    there = {**cells[0].identity(), "metrics": {"kept": 1.0}}
    cells[0].path(tmp_path).parent.mkdir(parents=True)
    cells[0].path(tmp_path).write_text(json.dumps(there))

    failed = run(cells, world, tmp_path, workers=1)

    said, error = capfd.readouterr()
    assert [cell.name for cell in failed] == ["blip/retrieval/random-0.63-seed1"]
    assert f"{failed[0].name}: the data is not there; put it there\n" in error
    assert "Traceback" not in error
    assert "1 cells are there, 2 to run" in said
    assert "blip/retrieval/random-0.63-seed1: FAILED" in said
    assert cells[0].content(tmp_path) == there
    assert cells[2].content(tmp_path) is not None
    assert [cell.name for cell in missing(cells, tmp_path)] == [failed[0].name]


def test_no_cell_is_begun_when_the_time_is_over(tmp_path: Path, world: World) -> None:
    cells = written("omp", "lamp")

    assert run(cells, world, tmp_path, workers=1, limit=-1.0) == []
    assert missing(cells, tmp_path) == cells


def test_a_cell_that_hangs_is_given_up(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "ENDED_AFTER", 0.5)

    failed = run([Hanging("blip", "retrieval", WAYS["omp"], 0.63)], world, tmp_path, workers=1)

    assert [cell.name for cell in failed] == ["blip/retrieval/omp-0.63-seed1"]


def test_list_says_of_each_cell_whether_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = TABLES["table5"].cells(1)
    cells[0].path(tmp_path).parent.mkdir(parents=True)
    cells[0].path(tmp_path).write_text(json.dumps(cells[0].identity()))
    cells[1].path(tmp_path).write_text(json.dumps({**cells[1].identity(), "version": 0}))
    cells[2].path(tmp_path).write_text("{")
    monkeypatch.setattr(sys, "argv", ["tables", "table5", "--list", "--cells", str(tmp_path)])

    with pytest.raises(SystemExit) as end:
        command.main()

    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"done    {cells[0].name}"
    assert lines[1:3] == [f"stale   {cell.name}" for cell in cells[1:3]]
    assert lines[3:] == [f"missing {cell.name}" for cell in cells[3:]]


def test_list_without_a_table_counts_the_cells_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = TABLES["table5"].cells(1)
    cells[0].path(tmp_path).parent.mkdir(parents=True)
    cells[0].path(tmp_path).write_text(json.dumps(cells[0].identity()))
    cells[1].path(tmp_path).write_text("{")
    monkeypatch.setattr(sys, "argv", ["tables", "--list", "--cells", str(tmp_path)])

    with pytest.raises(SystemExit) as end:
        command.main()

    assert not end.value.code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counted = {name: counts for name, *counts in lines if name in TABLES}
    assert counted.keys() == TABLES.keys()
    expected = ["1", "done", str(len(cells) - 2), "missing", "1", "stale"]
    assert counted["table5"] == expected
    assert len(lines) < 2 * len(TABLES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabel5"], "no table 'tabel5' (did you mean 'table5'?)"),
        (["table5", "--render"], "damaged"),
        (["--list", "--render"], "not allowed with"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    path = TABLES["table5"].cells(1)[0].path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setattr(sys, "argv", ["tables", *words, "--cells", str(tmp_path)])

    with pytest.raises(SystemExit) as end:
        command.main()

    assert end.value.code == 2
    assert said in capsys.readouterr().err
