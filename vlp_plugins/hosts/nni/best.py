"""The best trial of an experiment, from the folders that the trials left; NNI need not run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.runtime.artifacts import read_json, write_json
from vlp_plugins.runtime.errors import DataError, StatisticsError, first_line
from vlp_plugins.runtime.files import atomic_folder, check_new_folder
from vlp_plugins.runtime.untrusted import read_as

FILE = "trial.json"
_KIND = "trial of an NNI experiment"
_REMEDY = "leave the folder of this trial out, or run the experiment again"


@dataclass(frozen=True)
class TrialRecord:
    """One trial that ended well.

    Attributes:
        number: its place in the experiment, from 0.
        drawn: by key what the tuner chose.
        settings: of `TrialSettings`.
        target: the sparsity asked for, as it names the mask file.
        sparsity: the fraction of the prunable weights that is removed.
        metric: `recall` or `loss`.
        results: by steps of fine-tuning, from 0 on, the figures of `trial.measure`.
    """

    experiment: str
    trial: str
    number: int
    drawn: Mapping[str, Any]
    settings: Mapping[str, Any]
    method: str
    target: str
    sparsity: float
    metric: str
    results: Mapping[int, Mapping[str, float]]

    @property
    def final(self) -> Mapping[str, float]:
        """The figures at the end."""
        return self.results[max(self.results)]

    def save(self, folder: Path) -> None:
        """Writes `trial.json`; raises `OutputError` if it cannot be written."""
        write_json(folder / FILE, _KIND, asdict(self), overwrite=True)

    @classmethod
    def load(cls, folder: Path) -> TrialRecord:
        """Reads `trial.json`; `StatisticsError` if it is missing, damaged or too new."""
        content = read_json(folder / FILE, _KIND, _REMEDY)
        try:
            record: TrialRecord = read_as(cls, content, "the trial")
            if not math.isfinite(record.sparsity + record.final["default"]):
                raise ValueError("its sparsity or its result is not a finite number")
        except (KeyError, ValueError) as error:
            raise StatisticsError(
                f"{folder / FILE} is damaged ({first_line(error)}); {_REMEDY}"
            ) from error
        return record


@dataclass(frozen=True)
class FinishedTrial:
    """A trial and the folder of its masks."""

    folder: Path
    record: TrialRecord

    @property
    def value(self) -> float:
        """The result that the tuner got; the higher, the better."""
        return float(self.record.final["default"])


def finished_trials(folder: str | Path) -> list[FinishedTrial]:
    """The trials of an experiment that ended well, in their order.

    The folder is `OUT/EXPERIMENT`; or `OUT`, if there is a single experiment in it.

    Raises:
        DataError: if there are none, or there are several experiments.
        StatisticsError: if the record of a trial is damaged.
    """
    folder = Path(folder)
    found = _trials_in(folder)
    if not found:
        inner = sorted(path for path in _folders(folder) if _trials_in(path))
        if len(inner) > 1:
            raise DataError(
                f"{folder} holds {len(inner)} experiments; give the folder of one: "
                f"{', '.join(str(path) for path in inner)}"
            )
        if not inner:
            raise DataError(
                f"{folder} holds no trial that ended well (OUT/EXPERIMENT/TRIAL/{FILE}); give the "
                "folder that the trials' recipe names as out, and look at the trials' logs"
            )
        found = _trials_in(inner[0])
    trials = [FinishedTrial(path, TrialRecord.load(path)) for path in found]
    return sorted(trials, key=lambda trial: (trial.record.number, trial.record.trial))


def best_trial(
    trials: Sequence[FinishedTrial], *, min_sparsity: float | None = None
) -> FinishedTrial:
    """The trial of an experiment with the highest final result; the first of equal ones.

    A search that draws the sparsity finds the lowest one best; so only trials that remove at least
    `min_sparsity` count, if it is given.

    Raises:
        DataError: if none is as sparse, or they were measured in different ways.
    """
    if len(metrics := {trial.record.metric for trial in trials}) > 1:
        raise DataError(f"the trials were measured by {' and '.join(sorted(metrics))}; compare one")
    lowest = 0.0 if min_sparsity is None else min_sparsity
    # An exact count is rounded down: 0.75 of 10 elements removes 7.
    enough = [trial for trial in trials if trial.record.sparsity >= lowest - 1e-3]
    if not enough:
        highest = max(trial.record.sparsity for trial in trials)
        raise DataError(f"no trial removes {lowest:g} of the weights; the most is {highest:.4g}")
    return max(enough, key=lambda trial: trial.value)


def export_trial(trial: FinishedTrial, out: str | Path, *, overwrite: bool = False) -> Path:
    """Copies masks, recipe and report of a trial to a new folder, whole or not at all.

    Raises:
        DataError: if there is a link in the trial's folder: trials write none.
        OutputError: if the folder exists or cannot be written.
    """
    check_new_folder(out, mark=FILE, overwrite=overwrite)
    if link := next((path for path in trial.folder.rglob("*") if path.is_symlink()), None):
        raise DataError(f"{link} is a link and not what the trial wrote; remove it, or copy it")
    with atomic_folder(out, mark=FILE, overwrite=overwrite) as folder:
        shutil.copytree(trial.folder, folder, dirs_exist_ok=True)
    return Path(out)


def _trials_in(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if (path / FILE).is_file()]


def _folders(folder: Path) -> list[Path]:
    """Those whose writing has ended."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
