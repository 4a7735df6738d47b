"""A real experiment: NNI's manager, its local training service and web portal, and our trials."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from nni_trial_examples import command, masks_of, save_world

from vlp_plugins.hosts.nni.best import finished_trials
from vlp_plugins.jobs.prune import run
from vlp_plugins.jobs.recipes import Recipe, load_recipe, with_options

SCRIPT = Path(__file__).with_name("nni_experiment_run.py")
CHITA_OR_MULTIFLOW = [
    {"_name": "multiflow"},
    {"_name": "chita", "lambda": {"_type": "loguniform", "_value": [1.0e-5, 1.0e-1]}},
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def settings(world: Path, *, trials: int, tuner: dict[str, Any], words: str) -> dict[str, Any]:
    """An experiment as its YAML has it, beside the recipe of its trials."""
    (world / "trial.yaml").write_text(
        "model: blip\nsparsity: 0.5\ndata: {source: train, batch_size: 3, batches: 2}\n"
        "out: trials\ndevice: cpu\n"
    )
    program = f"{sys.executable} -m vlp_plugins nni-trial trial.yaml"
    return {
        "experimentName": "pruners",
        "searchSpace": {"pruner": {"_type": "choice", "_value": CHITA_OR_MULTIFLOW}},
        "trialCommand": f"{program} {words}",
        "trialCodeDirectory": str(world),
        "trialConcurrency": 1,
        "maxTrialNumber": trials,
        "experimentWorkingDirectory": str(world / "nni"),
        "tuner": tuner,
        "trainingService": {"platform": "local", "useActiveGpu": False},
    }


def experiment(world: Path, config: dict[str, Any], port: int) -> dict[str, Any]:
    """Runs it in a process whose home lies in the test's folder; nothing of it stays."""
    (world / "search.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (world / "home").mkdir()
    environment = {**os.environ, "HOME": str(world / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(SCRIPT), "search.yaml", str(port), "report.json"]
    log = (world / "log.txt").open("w")
    with log, subprocess.Popen(words, cwd=world, env=environment, stdout=log, stderr=log) as run:
        try:
            assert run.wait(400) == 0, (world / "log.txt").read_text()
        finally:
            end(psutil.Process(run.pid) if run.poll() is None else None, world)
    found: dict[str, Any] = json.loads((world / "report.json").read_text())
    return found


def end(script: psutil.Process | None, world: Path) -> None:
    """Asks the script to stop the manager, and kills what is left of the experiment."""
    if script is not None:
        script.terminate()
        psutil.wait_procs([script], timeout=30)
    for process in left_over(world):
        process.kill()


def left_over(world: Path) -> list[psutil.Process]:
    """Processes that this experiment started: their command or folder lies in the test's."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(world) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Path]:
    yield save_world(tmp_path)
    assert left_over(tmp_path) == []


def test_an_experiment_chooses_between_multiflow_and_chita(world: Path, tmp_path: Path) -> None:
    words = "--finetune-steps 2 --report-every 1 --metric loss --pairs 6"
    config = settings(world, trials=2, tuner={"name": "GridSearch"}, words=words)
    (world / "search.yaml").write_text(yaml.safe_dump(config))
    checked = command("nni-trial", world / "trial.yaml", "--check", world / "search.yaml")
    assert checked.stdout == "ok: 3 draws tried, pruners multiflow, chita\n"

    port = free_port()
    found = experiment(world, config, port)

    logs = (world / "log.txt").read_text()
    assert found["status"] == "DONE", logs
    assert sorted(found["trials"].values()) == ["SUCCEEDED"] * 2, logs
    status, page = found["portal"]
    assert status == 200
    assert "<title>Neural Network Intelligence</title>" in page
    assert {each["trialJobId"] for each in found["rest"]} == set(found["trials"])

    folder = world / "trials" / found["experiment"]
    trials = {trial.record.trial: trial for trial in finished_trials(folder)}
    assert {each["trial"] for each in found["results"]} == set(trials) == set(found["trials"])
    for each in found["results"]:
        record = trials[each["trial"]].record
        assert record.drawn == each["drawn"]
        assert record.final == each["value"]
        reported = found["intermediate"][record.trial]
        assert reported == [record.results[step] for step in (0, 1, 2)]
    assert sorted(trial.record.method for trial in trials.values()) == ["chita", "multiflow"]
    assert [trial.record.number for trial in trials.values()] == [0, 1]

    best = max(found["results"], key=lambda each: each["value"]["default"])
    result = command("nni-best", folder, "--out", tmp_path / "best")
    assert f"of trial {best['trial']}" in result.stdout
    recipe = load_recipe(tmp_path / "best" / "recipe.yaml")
    assert masks_of(alone(recipe, world, tmp_path / "alone")) == masks_of(tmp_path / "best")


def alone(recipe: Recipe, world: Path, out: Path) -> Path:
    """The same recipe without NNI."""
    paths = {"model": str(world / recipe.model), "data": str(world / recipe.data.source)}
    return run(with_options(recipe, **paths, out=str(out))).out


@pytest.mark.long
def test_a_trial_that_fails_is_one_for_nni_too(world: Path) -> None:
    shutil.rmtree(world / "test")
    config = settings(world, trials=1, tuner={"name": "Random"}, words="--test ./test")
    found = experiment(world, config, free_port())
    assert list(found["trials"].values()) == ["FAILED"]
    assert found["results"] == []
    assert not (world / "trials").exists()


@pytest.mark.long
def test_a_longer_search_by_tpe_with_id_and_a_learning_rate(world: Path, tmp_path: Path) -> None:
    words = "--finetune-steps 3 --report-every 3 --metric loss --test test --batches 8"
    config = settings(
        world,
        trials=6,
        tuner={"name": "TPE", "classArgs": {"optimize_mode": "maximize", "seed": 1}},
        words=words,
    )
    guided = {"_type": "choice", "_value": [True, False]}
    config["searchSpace"]["pruner"]["_value"] = [
        {**each, "id": guided} for each in CHITA_OR_MULTIFLOW
    ]
    config["searchSpace"]["sparsity"] = {"_type": "uniform", "_value": [0.4, 0.9]}
    config["searchSpace"]["learning_rate"] = {"_type": "loguniform", "_value": [1.0e-5, 1.0e-2]}
    found = experiment(world, config, free_port())

    assert list(found["trials"].values()) == ["SUCCEEDED"] * 6, (world / "log.txt").read_text()
    trials = finished_trials(world / "trials" / found["experiment"])
    assert any(trial.record.method.startswith("id*") for trial in trials)
    assert len({trial.record.settings["learning_rate"] for trial in trials}) == 6
    result = command("nni-best", world / "trials", "--out", tmp_path / "best")
    best = max(found["results"], key=lambda each: each["value"]["default"])
    assert f"of trial {best['trial']}" in result.stdout
