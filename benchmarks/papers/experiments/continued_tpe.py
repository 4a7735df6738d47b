"""NNI's TPE that knows trials of an earlier experiment: a search that was stopped goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nni.algorithms.hpo.tpe_tuner import TpeTuner


class ContinuedTpe(TpeTuner):
    """TPE with a history. NNI's own `resume` needs the state of an experiment that ended well."""

    def __init__(self, known: Sequence[Mapping[str, Any]], **arguments: Any) -> None:
        """Takes `parameter` and `value` of every known trial, and what TPE takes."""
        super().__init__(**arguments)
        self._known = list(known)

    def update_search_space(self, space: Any) -> None:
        super().update_search_space(space)
        self.import_data(self._known)
        self._known = []
