"""What NNI's `config_list` asks for: scopes of weights, and how much each of them shall lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni.compression.base.target_space import PruningTargetSpace

from vlp_plugins.runtime.errors import SparsityError

Spaces = Mapping[str, Mapping[str, PruningTargetSpace]]
"""NNI's target spaces: by module path, by parameter name."""


@dataclass(frozen=True)
class Demand:
    """How much the weights of a scope shall lose.

    Attributes:
        ratio: fraction removed of all of them together.
        most: greatest fraction that each of them may lose (`max_sparse_ratio`).
        least: fraction that each of them loses at least (`min_sparse_ratio`).
    """

    ratio: float
    most: float = 1.0
    least: float = 0.0

    @property
    def floor(self) -> float:
        """Least fraction that each weight keeps."""
        return 1 - self.most

    @property
    def even(self) -> bool:
        """Whether the bounds leave no choice: every weight loses `most`."""
        return self.ratio >= self.most


@dataclass(frozen=True)
class Place:
    """Where NNI finds a weight: one of its names.

    Attributes:
        weight: canonical name.
        module: dotted path of the module that holds it.
        parameter: attribute of the module.
    """

    weight: str
    module: str
    parameter: str


@dataclass(frozen=True)
class Scope:
    """Weights that share out one sparsity: a `global_group_id`, or one entry of `config_list`.

    Attributes:
        label: for messages and manifests.
        weights: canonical names.
        places: every name of every weight.
        settings: what NNI shall know of the targets (`sparse_ratio`, ...).
    """

    label: str
    weights: tuple[str, ...]
    places: tuple[Place, ...]
    settings: Mapping[str, Any]

    def nni_config(self) -> list[dict[str, Any]]:
        """Entries of a `config_list` that select exactly these targets, by their names."""
        names: dict[str, list[str]] = {}
        for place in self.places:
            names.setdefault(place.parameter, []).append(place.module)
        return [
            {
                "op_names": modules,
                "target_names": [parameter],
                "target_settings": {parameter: dict(self.settings)},
            }
            for parameter, modules in names.items()
        ]

    def demand(self, spaces: Spaces) -> Demand:
        """What NNI asks for now; schedules change it as they go.

        As in NNI, a ratio outside of the bounds is the nearest of them.
        """
        space = spaces[self.places[0].module][self.places[0].parameter]
        most = 1.0 if space.max_sparse_ratio is None else float(space.max_sparse_ratio)
        least = float(space.min_sparse_ratio or 0.0)
        return Demand(min(most, max(least, float(space.sparse_ratio or 0.0))), most, least)


def merged(scopes: Sequence[Scope]) -> list[Scope]:
    """The scopes with those of one `global_group_id` made one.

    Raises:
        SparsityError: if entries of one group ask for different things.
    """
    found: dict[str, Scope] = {}
    for scope in scopes:
        first = found.setdefault(scope.label, scope)
        if first is scope:
            continue
        if dict(first.settings) != dict(scope.settings):
            raise SparsityError(
                f"entries of {scope.label} ask for {_text(first)} and for {_text(scope)}; give "
                "all of one group the same, or use several groups"
            )
        found[scope.label] = Scope(
            scope.label,
            (*first.weights, *scope.weights),
            (*first.places, *scope.places),
            scope.settings,
        )
    return list(found.values())


def _text(scope: Scope) -> str:
    return ", ".join(f"{key}={value}" for key, value in scope.settings.items())
