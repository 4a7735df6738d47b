"""Runs an NNI experiment to its end, as a script with a home of its own: CONFIG PORT REPORT.

Writes what the manager says to REPORT, and stops the manager whatever happens.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from nni.experiment import Experiment
from nni.experiment.config import ExperimentConfig

SECONDS = 300


def page(port: int, path: str) -> tuple[int, str]:
    """Status and text of a page of the web portal; no proxy is asked."""
    with build_opener(ProxyHandler({})).open(f"http://localhost:{port}{path}", timeout=20) as got:
        return got.status, got.read().decode()


def wait(experiment: Experiment) -> str:
    """The status of the experiment when nothing more happens."""
    end = time.monotonic() + SECONDS
    while (status := experiment.get_status()) not in ("DONE", "STOPPED", "ERROR"):
        if time.monotonic() > end:
            return f"{status} after {SECONDS} s"
        time.sleep(0.5)
    return status


def found(experiment: Experiment, port: int) -> dict[str, Any]:
    """What the manager knows of an experiment that has ended."""
    trials = experiment.list_trial_jobs()
    metrics = experiment.get_job_metrics()
    return {
        "experiment": experiment.id,
        "portal": page(port, "/index.html"),
        "rest": json.loads(page(port, "/api/v1/nni/trial-jobs")[1]),
        "trials": {trial.trialJobId: trial.status for trial in trials},
        "intermediate": {
            name: [each.data for each in of_trial if each.type == "PERIODICAL"]
            for name, of_trial in metrics.items()
        },
        "results": [
            {"trial": each.trialJobId, "drawn": each.parameter, "value": each.value}
            for each in experiment.export_data()
        ],
    }


def main(config: str, port: int, report: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    experiment = Experiment(ExperimentConfig.load(config))
    try:
        experiment.start(port)
        status = wait(experiment)
        Path(report).write_text(json.dumps({"status": status, **found(experiment, port)}))
    finally:
        experiment.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
