"""`trial.json`: what a trial was given, and how good what it made is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.runtime.artifacts import read_json, write_json
from vlp_plugins.runtime.errors import StatisticsError

FILE = "trial.json"
_KIND = "trial of an NNI experiment"
_REMEDY = "leave the folder of this trial out, or run the experiment again"


@dataclass(frozen=True)
class TrialRecord:
    """One trial that ended well.

    Attributes:
        experiment: id.
        trial: id.
        number: its place in the experiment, from 0.
        drawn: by key what the tuner chose.
        settings: of `TrialSettings`.
        method: that pruned.
        target: the sparsity asked for, as it names the mask file.
        sparsity: the fraction of the prunable weights that is removed.
        metric: `recall` or `loss`.
        results: by steps of fine-tuning, from 0 on, the figures of `Yardstick.measure`.
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
        """Writes `trial.json`.

        Raises:
            OutputError: if it cannot be written.
        """
        write_json(folder / FILE, _KIND, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> TrialRecord:
        """Reads `trial.json`.

        Raises:
            StatisticsError: if it is missing, damaged or too new.
        """
        content = read_json(folder / FILE, _KIND, _REMEDY)
        try:
            values = {name: content[name] for name in cls.__dataclass_fields__}
            values["results"] = {int(step): found for step, found in values["results"].items()}
            record = cls(**values)
            record._check()
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StatisticsError(
                f"{folder / FILE} is damaged ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error
        return record

    def _check(self) -> None:
        """Raises if a value is not of the type that trials are compared and shown by."""
        for name in ("experiment", "trial", "method", "target", "metric"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}, not text")
        if type(self.number) is not int or not isinstance(self.drawn, Mapping):
            raise TypeError(f"number is {self.number!r:.80}, drawn {self.drawn!r:.80}")
        for name, value in (("sparsity", self.sparsity), ("default", self.final["default"])):
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r:.80}, not a finite number")
