"""Modules that were documented under other names: they are still found there, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "vlp_plugins.adapter": "vlp_plugins.models.adapter",
    "vlp_plugins.allocation": "vlp_plugins.scoring.allocation",
    "vlp_plugins.calibration.statistic": "vlp_plugins.calibration.moments",
    "vlp_plugins.errors": "vlp_plugins.runtime.errors",
    "vlp_plugins.intrinsic": "vlp_plugins.dimension.profile",
    "vlp_plugins.intrinsic.profile": "vlp_plugins.dimension.profile",
    "vlp_plugins.lock": "vlp_plugins.masks.lock",
    "vlp_plugins.lora": "vlp_plugins.masks.lora",
    "vlp_plugins.methods.base": "vlp_plugins.extend",
    "vlp_plugins.module_adapter": "vlp_plugins.models.generic",
    "vlp_plugins.plugins": "vlp_plugins.models.discovery",
    "vlp_plugins.scorers": "vlp_plugins.scoring.score",
    "vlp_plugins.scorers.base": "vlp_plugins.scoring.score",
    "vlp_plugins.scorers.magnitude": "vlp_plugins.scoring.magnitude",
    "vlp_plugins.selection": "vlp_plugins.scoring.selection",
    "vlp_plugins.solvers": "vlp_plugins.methods.chita.solver.solve",
    "vlp_plugins.solvers.problem": "vlp_plugins.methods.chita.solver.problem",
    "vlp_plugins.solvers.rows": "vlp_plugins.methods.chita.solver.problem",
    "vlp_plugins.solvers.solve": "vlp_plugins.methods.chita.solver.solve",
    "vlp_plugins.sparse": "vlp_plugins.masks.sparse",
    "vlp_plugins.statistics": "vlp_plugins.calibration.moments",
    "vlp_plugins.statistics.base": "vlp_plugins.calibration.moments",
    "vlp_plugins.statistics.second_moment": "vlp_plugins.calibration.moments",
    "vlp_plugins.statistics.store": "vlp_plugins.calibration.statistics",
    "vlp_plugins.training": "vlp_plugins.methods.gradual.pruning",
    "vlp_plugins.weights": "vlp_plugins.models.weights",
}


class _Forwarding(MetaPathFinder, Loader):
    """Imports the module that replaced another; the last finder to be asked."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # As a package, so that the modules of a former package are asked for here, too.
        return ModuleSpec(fullname, self, is_package=True) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        place = _MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {place}; plug-ins import from vlp_plugins.extend",
            FutureWarning,
            stacklevel=2,
        )
        found = importlib.import_module(place)
        public = {name: value for name, value in vars(found).items() if not name.startswith("__")}
        module.__dict__.update(public)
        module.__doc__ = found.__doc__


def forward_moved_modules() -> None:
    """Makes the former names importable."""
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarding())
