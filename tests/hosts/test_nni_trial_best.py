"""The best trial of an experiment is found in the folders that the trials left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nni_trial_examples import command

from vlp_plugins.hosts.nni.best import TrialRecord, best_trial, export_trial, finished_trials
from vlp_plugins.runtime.errors import DataError, OutputError, StatisticsError


def leave(folder: Path, number: int, value: float, sparsity: float, metric: str = "loss") -> None:
    """What a trial leaves, with a file in place of its masks."""
    place = folder / f"trial{number}"
    place.mkdir(parents=True)
    (place / "masks-x.safetensors").write_text(str(number))
    drawn = {"pruner": {"_name": "chita", "lambda": 0.1}}
    results = {0: {"default": -99.0}, 10: {"default": value}}
    record = TrialRecord(
        folder.name, place.name, number, drawn, {}, "chita", "x", sparsity, metric, results
    )
    record.save(place)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    folder = tmp_path / "trials" / "exp1"
    for number, (value, sparsity) in enumerate([(-1.0, 0.5), (-3.0, 0.75), (-2.0, 0.75)]):
        leave(folder, number, value, sparsity)
    leave(folder, 10, -2.0, 0.75)
    (folder / "killed").mkdir()
    leave(folder, 11, 0.0, 0.9)
    (folder / "trial11").rename(folder / ".unfinished-ab")
    return folder


def test_the_best_one(experiment) -> None:
    trials = finished_trials(experiment)
    assert [trial.record.number for trial in trials] == [0, 1, 2, 10]
    assert best_trial(trials).record.number == 0
    assert best_trial(trials, min_sparsity=0.75).record.number == 2
    assert finished_trials(experiment.parent) == trials
    with pytest.raises(DataError, match="no trial removes 0.8 of the weights; the most is 0.75"):
        best_trial(trials, min_sparsity=0.8)


def test_the_command_copies_it(experiment, tmp_path) -> None:
    out = tmp_path / "best"
    result = command("nni-best", experiment.parent, "--out", out, "--min-sparsity", "0.7")
    assert (out / "masks-x.safetensors").read_text() == "2"
    assert TrialRecord.load(out).trial == "trial2"
    assert "trial2 *  chita   75.0000%  pruner chita, lambda 0.1" in result.stdout
    assert result.stdout.endswith(f"written: {out}, of trial trial2\n")
    with pytest.raises(OutputError, match="not empty"):
        export_trial(finished_trials(experiment)[0], out)
    assert (out / "masks-x.safetensors").read_text() == "2"


def test_what_cannot_be_compared(experiment, tmp_path) -> None:
    leave(experiment.parent / "exp2", 0, 1.0, 0.5)
    with pytest.raises(
        DataError, match="holds 2 experiments; give the folder of one: .*exp1.*exp2"
    ):
        finished_trials(experiment.parent)
    leave(experiment, 12, 50.0, 0.5, metric="recall")
    with pytest.raises(DataError, match="measured by loss and recall"):
        best_trial(finished_trials(experiment))
    with pytest.raises(DataError, match="holds no trial that ended well"):
        finished_trials(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged, truncated or no JSON"),
        ('{"kind": "else"}', "holds 'else', not"),
        ('{"kind": "trial of an NNI experiment", "schema": 1}', "is damaged .the trial has no"),
        ('{"kind": "trial of an NNI experiment", "schema": 99}', "newer than the 1"),
    ],
)
def test_damaged_records(experiment, text, message) -> None:
    (experiment / "trial0" / "trial.json").write_text(text)
    with pytest.raises(StatisticsError, match=message):
        finished_trials(experiment)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": "3"},
        {"number": 3.5},
        {"sparsity": "0.5"},
        {"sparsity": None},
        {"drawn": [1]},
        {"method": 5},
        {"metric": ["loss"]},
        {"results": {}},
        {"results": {"0": {"default": "high"}}},
        {"results": {"0": {"default": float("nan")}}},
        {"results": {"0": {"loss": 1.0}}},
        {"results": {"first": {"default": 1.0}}},
    ],
)
def test_records_with_values_of_another_type_are_damaged(experiment, changes) -> None:
    path = experiment / "trial0" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StatisticsError, match="trial.json is damaged"):
        finished_trials(experiment)


def test_links_in_the_folder_of_a_trial_are_not_followed(experiment, tmp_path) -> None:
    (tmp_path / "secret").write_text("of another")
    (experiment / "trial0" / "notes").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="notes is a link and not what the trial wrote"):
        export_trial(finished_trials(experiment)[0], tmp_path / "best")
    assert not (tmp_path / "best").exists()
