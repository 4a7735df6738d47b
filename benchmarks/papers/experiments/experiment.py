"""Runs a search as an experiment of NNI on this machine: starts, waits, collects, stops."""

from __future__ import annotations

import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.experiments.searches import Search, Trial
from benchmarks.papers.running import LONGEST
from benchmarks.papers.world import World

_ROOT = Path(__file__).parents[3]
_POLL = 2.0  # seconds
_ENDED = ("DONE", "STOPPED", "ERROR")
_OPEN = ("UNKNOWN", "WAITING", "RUNNING")


def run(
    search: Search,
    seed: int,
    world: World,
    cells: Path,
    *,
    workers: int = 2,
    limit: float | None = None,
) -> int:
    """Runs the trials that are missing; NNI is not started if there are none.

    Args:
        search: what is searched.
        seed: of cells and tuner.
        world: models and data; made if they are not there.
        cells: folder of the cells' files; the record of the search lies beside it.
        workers: trials at a time.
        limit: seconds after which no further trial is begun; None: no limit.

    Returns:
        How many trials failed; 1 if the experiment itself did.
    """
    known = search.done(cells, seed)
    missing = search.trials - len(known)
    print(f"{search.name}: {len(known)} trials are there, {max(missing, 0)} to run", flush=True)
    if missing <= 0 or (limit is not None and limit <= 0):
        return 0
    world.make()
    settings = config(search, seed, world, cells, known, workers=workers, limit=limit)
    return _ended(settings, search, seed, cells, known)


def config(
    search: Search,
    seed: int,
    world: World,
    cells: Path,
    known: Sequence[Trial],
    *,
    workers: int,
    limit: float | None,
) -> dict[str, Any]:
    """The experiment as NNI's YAML would have it.

    A grid is gone through as a whole: trials of cells that are there end at once. TPE goes on.
    """
    module = "benchmarks.papers.experiments.trial"
    program = [sys.executable, "-m", module, search.name, "--seed", seed]
    folders = ["--cells", cells.absolute(), "--world", world.folder.absolute()]
    tuner: dict[str, Any] = {"name": search.tuner, "classArgs": dict(search.arguments)}
    trials = search.trials
    if search.tuner == "TPE":
        trials -= len(known)
        tuner["classArgs"]["seed"] = seed + len(known)  # not the draws of the first ones again
    if search.tuner == "TPE" and known:
        told = [{"parameter": each["parameters"], "value": each["value"]} for each in known]
        tuner = {
            "className": "continued_tpe.ContinuedTpe",
            "codeDirectory": str(Path(__file__).parent),
            "classArgs": {**tuner["classArgs"], "known": told},
        }
    settings: dict[str, Any] = {
        "experimentName": search.name,
        "searchSpace": dict(search.space),
        "trialCommand": shlex.join(str(word) for word in (*program, *folders)),
        "trialCodeDirectory": str(_ROOT),
        "trialConcurrency": workers,
        "maxTrialNumber": trials,
        "experimentWorkingDirectory": str((world.folder / "nni").absolute()),
        "tuner": tuner,
        "trainingService": {"platform": "local", "useActiveGpu": False},
    }
    if limit is not None:
        settings["maxExperimentDuration"] = f"{max(1, int(limit))}s"
    return settings


def _ended(
    settings: dict[str, Any], search: Search, seed: int, cells: Path, known: Sequence[Trial]
) -> int:
    """Runs an experiment to its end and stops it, whatever happens; the record grows with it."""
    from nni.experiment import Experiment
    from nni.experiment.config import ExperimentConfig

    experiment = Experiment(ExperimentConfig(**settings))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    said: dict[str, bool] = {}
    try:
        experiment.start(_free_port())
        while True:
            status = experiment.get_status()
            jobs = sorted(experiment.list_trial_jobs(), key=lambda job: int(job.sequenceId))
            ended = [job for job in jobs if job.status not in _OPEN]
            for job in ended:
                if job.trialJobId not in said:
                    said[job.trialJobId] = _well(job)
                    print(_line(job, jobs, search, seed), flush=True)
                    found = [
                        _trial(each, jobs, experiment.id, search, seed)
                        for each in ended
                        if _well(each)
                    ]
                    search.write(cells, seed, merged(search, known, found))
            if status in _ENDED:
                break
            time.sleep(_POLL)
    finally:
        experiment.stop()
        signal.signal(signal.SIGTERM, before)
    failed = sum(not well for well in said.values())
    return max(failed, int(status == "ERROR"))


def merged(search: Search, known: Sequence[Trial], found: Sequence[Trial]) -> list[Trial]:
    """Earlier trials and new ones.

    A grid that goes on is gone through from the start: what was known stays where it was. TPE may
    draw the same twice, and both are trials.
    """
    names = {each["cell"] for each in known} if search.tuner != "TPE" else set()
    return [*known, *(each for each in found if each["cell"] not in names)]


def _well(job: Any) -> bool:
    return job.status == "SUCCEEDED" and bool(job.finalMetricData)


def drawn_of(job: Any, jobs: Sequence[Any]) -> dict[str, Any]:
    """What a trial really ran with.

    Trials that begin at once may get each other's parameters, and NNI's list of jobs does not know;
    what they report does, and so does the tuner.
    """
    by_number = {each.hyperParameters[0].parameter_id: each.hyperParameters[0] for each in jobs}
    given = job.hyperParameters[0]
    if job.finalMetricData:
        given = by_number.get(int(job.finalMetricData[0].parameterId), given)
    parameters: dict[str, Any] = given.parameters
    return parameters


def _trial(job: Any, jobs: Sequence[Any], experiment: str, search: Search, seed: int) -> Trial:
    """What the record keeps of a trial that ended well."""
    drawn = drawn_of(job, jobs)
    return {
        "parameters": drawn,
        "cell": search.cell(drawn, seed).name,
        "value": job.finalMetricData[0].data["default"],
        "experiment": experiment,
    }


def _line(job: Any, jobs: Sequence[Any], search: Search, seed: int) -> str:
    name = search.cell(drawn_of(job, jobs), seed).name
    if not _well(job):
        return f"{name}: {job.status}; its log: {job.logPath}"
    seconds = (job.endTime - job.startTime) / 1000
    late = f", longer than {LONGEST:.0f}" if seconds > LONGEST else ""
    value = job.finalMetricData[0].data["default"]
    return f"{name}: {value:.1f} in {seconds:.0f} s{late}"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])
