"""The trial that this process is for NNI: what it was given, and whom it tells its results."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlp_plugins.runtime.errors import UnsupportedError

_log = logging.getLogger(__name__)

STANDALONE = "STANDALONE"
"""The id that NNI gives to the experiment and the trial of a script run by hand."""


class Trial(Protocol):
    """One trial of an experiment.

    Attributes:
        experiment: id.
        name: id of the trial.
        number: its place in the experiment, from 0.
        drawn: by key what the tuner chose.
    """

    experiment: str
    name: str
    number: int
    drawn: Mapping[str, Any]

    def intermediate(self, result: Mapping[str, float]) -> None:
        """Reports how good the model is by now; `default` is what tuners look at."""

    def final(self, result: Mapping[str, float]) -> None:
        """Reports how good the model is in the end."""


@dataclass
class NniTrial:
    """The trial that NNI started; outside of an experiment one to which nothing was given.

    Without an experiment NNI itself is in its stand-alone mode: it draws nothing, and shows results
    in the log.
    """

    experiment: str
    name: str
    number: int
    drawn: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def current(cls) -> NniTrial:
        """Asks NNI, once in a process.

        Raises:
            UnsupportedError: if NNI is not installed.
        """
        nni = _nni()
        if nni.get_trial_id() == STANDALONE:
            return cls(STANDALONE, STANDALONE, 0)
        warn_of_portal()
        drawn = nni.get_next_parameter() or {}
        return cls(nni.get_experiment_id(), nni.get_trial_id(), nni.get_sequence_id(), drawn)

    @property
    def alone(self) -> bool:
        """Whether there is no experiment."""
        return self.name == STANDALONE

    def intermediate(self, result: Mapping[str, float]) -> None:
        _nni().report_intermediate_result(dict(result))

    def final(self, result: Mapping[str, float]) -> None:
        _nni().report_final_result(dict(result))


def warn_of_portal() -> None:
    """Says once in a process who can reach the experiment: NNI itself does not."""
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "NNI's portal listens on all network interfaces and asks for no password: whoever "
            "reaches its port can read and change the experiment; keep others from it by a "
            "firewall or a network namespace (see README, In NNI)"
        )


_warned = False


def _nni() -> Any:
    try:
        import nni
    except ImportError as error:
        raise UnsupportedError(
            f'a trial of an NNI experiment needs NNI ({error}): pip install "vlp-plugins[nni]"'
        ) from error
    return nni
