"""Searches of the tables: from draws to cells, kept cells reported, records that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.papers.catalogue import TABLES
from benchmarks.papers.cell import Cell
from benchmarks.papers.experiments import experiment, lambda_grid, pruner_search
from benchmarks.papers.experiments import trial as nni_trial
from benchmarks.papers.experiments.continued_tpe import ContinuedTpe
from benchmarks.papers.experiments.searches import LAMBDA_GRID, SEARCHES, TPE, result_of
from benchmarks.papers.findings import Entry, Found
from benchmarks.papers.plots import svg_of
from benchmarks.papers.table10 import listed
from benchmarks.papers.views import penalties
from benchmarks.papers.views.penalties import as_good
from benchmarks.papers.ways import LAMBDA, WAYS
from benchmarks.papers.world import World
from vlp_plugins.hosts.nni.search import draws
from vlp_plugins.methods.resolve import resolve_method
from vlp_plugins.runtime.errors import OutputError

ROOT = Path(__file__).parents[2]
FIRST = {"method": "chita", "model": "blip", "lambda": 1e-8}
CHITA = {"pruner": {"_name": "chita", "lambda": 0.5, "allocation": "modality"}}
GUIDED = {"pruner": {"_name": "lamp", "allocation": "global", "floor": 0.1, "id": True}}


@dataclass
class Told:
    """A trial that keeps what it is told to report."""

    drawn: Mapping[str, Any]
    experiment: str = "exp"
    name: str = "one"
    number: int = 0
    ended: list[Mapping[str, float]] = field(default_factory=list)

    def intermediate(self, result: Mapping[str, float]) -> None:
        raise AssertionError("a cell has one result")

    def final(self, result: Mapping[str, float]) -> None:
        self.ended.append(result)


def keep(cell: Cell, cells: Path, text: float, image: float) -> None:
    """Writes what the cell would have written."""
    metrics = {
        "image_to_text_r1": 1.0,
        "text_to_image_r1": 1.0,
        "features_image_to_text_r1": text,
        "features_text_to_image_r1": image,
    }
    path = cell.path(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**cell.identity(), "metrics": metrics, "absent": {}}))


def trial(drawn: Mapping[str, Any], value: float) -> dict[str, Any]:
    name = TPE.cell(drawn, 1).name
    return {"parameters": dict(drawn), "cell": name, "value": value, "experiment": "earlier"}


def test_the_grid_is_the_papers_and_the_penalty_of_the_other_tables() -> None:
    cells = lambda_grid.cells(1)

    assert lambda_grid.LAMBDAS == (LAMBDA, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    assert len({cell.name for cell in cells}) == len(cells) == LAMBDA_GRID.trials == 40
    assert {cell.name for cell in cells} == {
        LAMBDA_GRID.cell(drawn, 1).name
        for method in lambda_grid.METHODS
        for model in lambda_grid.MODELS
        for value in lambda_grid.LAMBDAS
        for drawn in [{"method": method, "model": model, "lambda": value}]
    }
    first = LAMBDA_GRID.cell(FIRST, 2)
    assert first.name == "blip/retrieval/chita-lambda-1e-08-0.63-seed2-dev"
    assert first.way is not None
    assert first.way.as_dict() == WAYS["chita"].as_dict()
    assert TABLES["table10"].cells(1) == cells


def test_a_penalty_that_became_a_whole_number_on_the_way_is_the_same_cell() -> None:
    drawn = json.loads('{"method": "chita++", "model": "xvlm", "lambda": 1}')
    way = LAMBDA_GRID.cell(drawn, 1).way

    assert way is not None
    assert way.as_dict() == lambda_grid.way("chita++", 1.0).as_dict()
    assert json.dumps(way.as_dict()["parameters"]) == '{"lambda": 1.0, "rounds": 4}'


def test_draws_become_ways_with_a_method_its_parameters_and_options() -> None:
    way = TPE.cell(CHITA, 1).way
    assert way is not None
    assert (way.method, way.parameters, way.options, way.samples) == (
        "chita",
        {"lambda": 0.5},
        {"allocation": "modality"},
        128,
    )
    way = TPE.cell(GUIDED, 1).way
    assert way is not None
    assert (way.method, way.parameters) == ("id*lamp", {})
    assert way.options == {"allocation": "global", "floor": 0.1}


def test_a_floor_that_became_a_whole_number_on_the_way_is_the_same_cell() -> None:
    drawn = {"pruner": {**GUIDED["pruner"], "floor": 0.0}}
    whole = {"pruner": {**GUIDED["pruner"], "floor": 0}}

    assert TPE.cell(drawn, 1).name == TPE.cell(whole, 1).name


def test_every_draw_is_a_cell_of_its_own_that_methods_accept() -> None:
    found = list(draws(TPE.space))
    names = set()
    for drawn in found:
        cell = TPE.cell(drawn, 1)
        assert (cell.model, cell.sparsity, cell.split) == ("blip", 0.75, "dev")
        assert cell.way is not None
        resolve_method(
            cell.way.method, cell.way.options["allocation"], [0.75], dict(cell.way.parameters)
        )
        names.add(cell.name)
    assert len(names) == len(found)
    assert TPE.trials >= 20


def test_a_trial_of_a_kept_cell_reports_it_and_runs_nothing(tmp_path: Path) -> None:
    keep(TPE.cell(GUIDED, 1), tmp_path / "cells", 30.0, 20.5)
    told = Told(GUIDED)

    nni_trial.run(TPE, told, 1, World(tmp_path / "nowhere"), tmp_path / "cells")

    assert told.ended == [{"default": 25.25, "text": 30.0, "image": 20.5}]


def test_a_trial_of_a_missing_cell_runs_it(tmp_path: Path, monkeypatch: Any) -> None:
    ran = []

    def run(self: Cell, world: World, out: Path) -> None:
        ran.append(self.name)
        keep(self, out, 10.0, 20.0)

    monkeypatch.setattr(Cell, "run", run)
    told = Told(FIRST)
    nni_trial.run(LAMBDA_GRID, told, 1, World(tmp_path), tmp_path / "cells")

    assert ran == ["blip/retrieval/chita-lambda-1e-08-0.63-seed1-dev"]
    assert told.ended[0]["default"] == 15.0


def test_a_record_has_the_trials_whose_cells_are_there(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    keep(TPE.cell(CHITA, 1), cells, 1.0, 2.0)
    assert TPE.done(cells, 1) == []
    TPE.write(cells, 1, [trial(GUIDED, 4.0), trial(CHITA, 9.0)])

    assert (tmp_path / "search-tpe-blip.json").exists()
    assert TPE.done(cells, 1) == [trial(CHITA, 1.5)]  # what the cell says, whatever was told
    assert TPE.done(cells, 2) == []
    assert listed(cells, 1)[-1] == "1/24 trials of tpe-blip, seed 1"
    with pytest.raises(OutputError, match="other settings"):
        replace(TPE, arguments={}).done(cells, 1)


def test_a_search_that_is_done_starts_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    cells = tmp_path / "cells"
    keep(TPE.cell(CHITA, 1), cells, 1.0, 2.0)
    TPE.write(cells, 1, [trial(CHITA, 1.5)])
    monkeypatch.setattr(World, "make", lambda self: pytest.fail("something was started"))

    assert experiment.run(replace(TPE, trials=1), 1, World(tmp_path), cells) == 0
    assert experiment.run(TPE, 1, World(tmp_path), cells, limit=-1.0) == 0


def test_an_experiment_that_was_stopped_goes_on_with_what_is_known(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    made = experiment.config(TPE, 1, World(tmp_path), cells, [], workers=2, limit=None)
    assert made["tuner"]["name"] == "TPE"
    assert made["maxTrialNumber"] == 24

    known = [trial(CHITA, 1.5)]
    made = experiment.config(TPE, 1, World(tmp_path), cells, known, workers=2, limit=90.5)
    assert made["maxTrialNumber"] == 23
    assert made["maxExperimentDuration"] == "90s"
    assert made["tuner"]["className"] == "continued_tpe.ContinuedTpe"
    assert made["tuner"]["classArgs"]["known"] == [{"parameter": CHITA, "value": 1.5}]
    assert made["tuner"]["classArgs"]["seed"] == 2

    grid = experiment.config(LAMBDA_GRID, 1, World(tmp_path), cells, [], workers=2, limit=None)
    assert grid["tuner"] == {"name": "GridSearch", "classArgs": {}}
    assert grid["maxTrialNumber"] == 40


def test_new_trials_come_after_those_that_are_known() -> None:
    known = [trial(CHITA, 1.5)]
    new = [trial(GUIDED, 4.0), trial(CHITA, 1.5)]

    assert experiment.merged(LAMBDA_GRID, known, new) == [*known, trial(GUIDED, 4.0)]
    assert experiment.merged(TPE, known, new) == [*known, *new]  # it may draw the same again


def job(number: int, drawn: Any, reported: int | None) -> Any:
    """As NNI lists one: what it was meant to run with, and whose result it reported."""
    given = SimpleNamespace(parameter_id=number, parameters=drawn)
    metrics = [] if reported is None else [SimpleNamespace(parameterId=str(reported))]
    return SimpleNamespace(hyperParameters=[given], finalMetricData=metrics)


def test_a_result_belongs_to_the_parameters_that_it_reports() -> None:
    jobs = [job(0, CHITA, 1), job(1, GUIDED, 0), job(2, FIRST, None)]  # as NNI mixes them up

    drawn = [experiment.drawn_of(each, jobs) for each in jobs]

    assert drawn == [GUIDED, CHITA, FIRST]


def test_tpe_learns_from_trials_of_an_earlier_experiment() -> None:
    good = {"pruner": {"_name": "wanda", "allocation": "row", "id": True}}
    bad = [{"pruner": {"_name": "tamt", "allocation": "layer", "floor": 0.0, "steps": n}}
           for n in (24, 48, 72)]  # fmt: skip
    known = [{"parameter": good, "value": 90.0}]
    known += [{"parameter": each, "value": 1.0} for each in bad * 4]
    tuner = ContinuedTpe(
        known, optimize_mode="maximize", seed=3, tpe_args={"n_startup_jobs": 8, "prior_weight": 0.1}
    )
    tuner.update_search_space(TPE.space)
    drawn = [tuner.generate_parameters(number)["pruner"]["_name"] for number in range(6)]
    assert drawn.count("tamt") == 0


def test_what_trials_report_is_the_average_by_features() -> None:
    metrics = {"features_image_to_text_r1": 10.0, "features_text_to_image_r1": 5.0}
    assert result_of({"metrics": metrics}) == {"default": 7.5, "text": 10.0, "image": 5.0}


def test_the_page_has_the_papers_figures_and_the_trials_by_value(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    for value, recall in ((1e-8, 40.0), (0.1, 39.0), (1.0, 0.1)):
        keep(lambda_grid.cell("blip", "chita", value, 1), cells, recall, recall)
    for drawn, recall in ((CHITA, 20.0), (GUIDED, 30.0)):
        keep(TPE.cell(drawn, 1), cells, recall, recall)
    TPE.write(cells, 1, [trial(CHITA, 20.0), trial(GUIDED, 30.0)])

    found = Found(lambda_grid.cells(1), cells)
    rendered = penalties(found)
    text = "\n".join(rendered.lines)

    assert "**40.0**" in text
    assert "ERR" in text
    assert "58.64" in text
    assert "- chita: 1e-8 is best; as good: 1e-1. The paper's best: 1e-1." in text
    assert text.index("id*lamp") < text.index("lambda 0.5, allocation modality")
    assert rendered.figure is not None
    assert "<svg" in svg_of(rendered.figure)


def test_penalties_within_two_standard_errors_are_as_good() -> None:
    entries = {value: Entry(1, 1, {1: mean}) for value, mean in ((1.0, 40.0), (2.0, 38), (3.0, 20))}
    assert as_good(entries, 500) == (1.0, [2.0])
    assert as_good({1.0: Entry(1, 0)}, 500) is None


RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from benchmarks.papers.experiments import experiment
from benchmarks.papers.experiments.searches import SEARCHES
from benchmarks.papers.world import World
name, trials, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
World.make = lambda self: None
search = replace(SEARCHES[name], trials=trials)
sys.exit(experiment.run(search, 1, World(folder / "world"), folder / "cells", workers=2))
"""


def run_for_real(name: str, trials: int, folder: Path) -> str:
    """An experiment of NNI, whose home is in the folder."""
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", RUN, name, str(trials), str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_nni_goes_through_a_grid_and_tpe_goes_on(tmp_path: Path) -> None:
    for value in lambda_grid.LAMBDAS[:2]:
        keep(lambda_grid.cell("blip", "chita", value, 1), tmp_path / "cells", 10.0, value)
    said = run_for_real("lambda-grid", 2, tmp_path)
    assert "chita-lambda-1e-05-0.63-seed1-dev: 5.0 in" in said
    trials = LAMBDA_GRID.done(tmp_path / "cells", 1)
    # Trials that begin at once may get each other's parameters.
    assert sorted(each["parameters"]["lambda"] for each in trials) == [1e-8, 1e-5]
    assert "2 trials are there, 0 to run" in run_for_real("lambda-grid", 2, tmp_path)

    keep(TPE.cell(CHITA, 1), tmp_path / "cells", 1.0, 2.0)
    known = [trial(CHITA, 1.5)]
    TPE.write(tmp_path / "cells", 1, known)
    folder = World(tmp_path / "world")
    settings = experiment.config(TPE, 1, folder, tmp_path, known, workers=2, limit=None)
    tuner = ContinuedTpe(**settings["tuner"]["classArgs"])
    tuner.update_search_space(TPE.space)
    next_one = tuner.generate_parameters(0)
    keep(TPE.cell(next_one, 1), tmp_path / "cells", 7.0, 9.0)
    run_for_real("tpe-blip", 2, tmp_path)
    first, second = TPE.done(tmp_path / "cells", 1)
    assert first == known[0]
    assert (second["parameters"], second["value"]) == (next_one, 8.0)


def test_the_searches_are_those_of_the_table() -> None:
    assert list(SEARCHES) == ["lambda-grid", "tpe-blip"]
    assert pruner_search.TRIALS >= 20
