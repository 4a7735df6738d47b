"""NNI's `config_list`: its selection and amounts as scopes of an adapter's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.target_space import PruningTargetSpace
from schema import SchemaError
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError, first_line, suggest

_log = logging.getLogger(__name__)

Spaces = Mapping[str, Mapping[str, PruningTargetSpace]]
"""NNI's target spaces: by module path, by parameter name."""


@dataclass(frozen=True)
class Demand:
    """How much the weights of a scope lose.

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
    """One of the names of a weight: the module and the parameter of it where NNI finds it."""

    weight: str
    module: str
    parameter: str


@dataclass(frozen=True)
class Scope:
    """Weights with one sparsity in all: a `global_group_id`, or one entry of `config_list`.

    Attributes:
        places: every name of every weight.
        settings: NNI's settings of the targets (`sparse_ratio`, ...).
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
        """What NNI asks for now, as schedules change it; ratios are clipped to the bounds."""
        space = spaces[self.places[0].module][self.places[0].parameter]
        most = 1.0 if space.max_sparse_ratio is None else float(space.max_sparse_ratio)
        least = float(space.min_sparse_ratio or 0.0)
        return Demand(min(most, max(least, float(space.sparse_ratio or 0.0))), most, least)


def _joined(first: Scope, other: Scope) -> Scope:
    """Two parts of one `global_group_id` as one scope."""
    if dict(first.settings) != dict(other.settings):
        raise SparsityError(
            f"entries of {first.label} ask for {_text(first)} and for {_text(other)}; give "
            "all of one group the same, or use several groups"
        )
    weights, places = (*first.weights, *other.weights), (*first.places, *other.places)
    return replace(first, weights=weights, places=places)


def _text(scope: Scope) -> str:
    return ", ".join(f"{key}={value}" for key, value in scope.settings.items())


def _reason_of(parameters: Sequence[str], model: nn.Module, adapter: Adapter) -> str:
    """Why none of the parameters of a layer is pruned, by their paths."""
    names = [name for name in parameters if not name.endswith(".bias")] or [*parameters]
    for exclusion in adapter.exclusions(model) if names else ():
        if re.search(exclusion.pattern, names[0]):
            return exclusion.reason
    return "it has no weight" if not names else f"adapter {adapter.name!r} does not prune it"


def _examples_of(dense: Mapping[str, str]) -> str:
    """By reason one layer, and how many more there are: `: a.b and 3 more (embedding)`."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in dense.items():
        by_reason.setdefault(reason, []).append(path)
    parts = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({reason})"
        for reason, paths in by_reason.items()
    ]
    return f": {', '.join(parts)}" if parts else ""


_SELECTORS = (
    "op_names",
    "op_types",
    "op_names_re",
    "exclude_op_names",
    "exclude_op_types",
    "exclude_op_names_re",
)
_AMOUNTS = ("sparse_ratio", "max_sparse_ratio", "min_sparse_ratio", "global_group_id")
_REFUSED = {
    "sparse_threshold": "scores have no common scale; give sparse_ratio",
    "dependency_group_id": "every weight has a mask of its own; leave it out",
    "internal_metric_block": "single weights are removed, not blocks; leave it out",
    "align": "weights only are pruned, by their own scores; leave it out",
}
_HINTS = {
    "group_id": "NNI 3 calls it global_group_id",
    "sparsity": "NNI 3 calls it sparse_ratio",
}


def read_config(
    config_list: Sequence[Mapping[str, Any]], model: nn.Module, adapter: Adapter
) -> list[Scope]:
    """The scopes that a `config_list` of NNI describes for a model without wrappers.

    A weight belongs to the first entry that selects one of its names; all its names go with it.
    What an entry of NNI 2 with `exclude: True` selects, no other entry does. Layers that the
    adapter does not prune stay dense where types or patterns select them.

    Raises:
        UnsupportedError: if it is not NNI's, asks for what is not offered, names a layer that does
            not exist or is not pruned, or selects nothing.
        SparsityError: if a ratio is missing, or entries of one group differ.
    """
    weights = WeightMap.of(model, adapter)
    taken: set[str] = set()
    scopes: dict[str, Scope] = {}
    for index, config in enumerate(_modern(config_list, model)):
        where = f"config_list[{index}]"
        settings = _settings(config, where)
        chosen = _weights(config, where, model, adapter, weights)
        if again := [name for name in chosen if name in taken]:
            _log.warning(
                "%s selects %d weights that an earlier entry has (first %r); that one counts",
                where,
                len(again),
                again[0],
            )
        own = [weight for name, weight in chosen.items() if name not in taken]
        taken.update(chosen)
        if own:
            group = settings.get("global_group_id")
            label = where if group is None else f"global_group_id {group!r}"
            places = tuple(place for weight in own for place in _places_of(model, weight))
            scope = Scope(label, tuple(w.name for w in own), places, settings)
            scopes[label] = _joined(scopes[label], scope) if label in scopes else scope
    if not scopes:
        raise UnsupportedError("config_list is empty; give for instance "
                               '[{"op_types": ["Linear"], "sparse_ratio": 0.75}]')  # fmt: skip
    return list(scopes.values())


def _places_of(model: nn.Module, weight: Weight) -> list[Place]:
    """Every module that holds a weight, each module once."""
    found: dict[int, Place] = {}
    for alias in weight.aliases:
        module, _, parameter = alias.rpartition(".")
        place = Place(weight.name, module, parameter)
        found.setdefault(id(model.get_submodule(module)), place)
    return list(found.values())


def _modern(config_list: Sequence[Mapping[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    if isinstance(config_list, Mapping):
        raise UnsupportedError("config_list is one entry, not a list; write [entry]")
    given, excluded = list[dict[str, Any]](), dict[str, None]()
    for index, config in enumerate(deepcopy(list(config_list))):
        where = f"config_list[{index}]"
        rest = dict(config)
        if rest.pop("exclude", False):
            excluded |= dict.fromkeys(_excluded(rest, where, model))
        else:
            given.append(rest)
    modern = trans_legacy_config_list(given)
    for config in modern if modern is not given else ():
        # The old format knew no targets; what NNI makes of it names bias, and groups wrongly.
        config["target_names"] = ["weight"]
        for setting in config.get("target_settings", {}).values():
            if "group_id" in setting:
                setting["global_group_id"] = setting.pop("group_id")
    for config in modern if excluded else ():
        config["exclude_op_names"] = [*config.get("exclude_op_names", ()), *excluded]
    schema = default_config_schema("pruning")
    for index, config in enumerate(modern):
        try:
            schema.validate(config)
        except SchemaError as error:
            hints = [f"; {hint}" for word, hint in _HINTS.items() if word in config]
            raise UnsupportedError(
                f"config_list[{index}] is not one that NNI takes: {first_line(error)}"
                f"{''.join(hints)}; ratios are floats such as 0.75"
            ) from error
    return modern


def _excluded(config: Mapping[str, Any], where: str, model: nn.Module) -> list[str]:
    """The layers that an entry with `exclude: True` names, by their paths."""
    selectors = {key: config[key] for key in _SELECTORS if key in config}
    if parts := config.get("op_partial_names"):
        selectors["op_names_re"] = [f".*{part}.*" for part in parts]
    _check_names(selectors, where, model)
    if not selectors or (strange := config.keys() - {*_SELECTORS, "op_partial_names"}):
        what = f"{', '.join(sorted(strange))} next to exclude" if selectors else "exclude alone"
        raise UnsupportedError(f"{where} has {what}; give op_types, op_names or op_names_re only")
    return list(select_modules_by_config(model, selectors)[0])


def _settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The amounts of one entry; raises for anything that would be ignored in silence."""
    targets = list(config.get("target_names") or ["weight"])
    given = {k: v for k, v in config.items() if k not in (*_SELECTORS, "target_names")}
    by_target = given.pop("target_settings", {})
    if targets != ["weight"] or set(by_target) - {"weight"}:
        raise UnsupportedError(
            f"{where} has targets {', '.join(dict.fromkeys([*targets, *by_target]))}; weights are "
            'what is pruned here: leave target_names out, or give ["weight"]'
        )
    given |= by_target.get("weight", {})
    for key, why in _REFUSED.items():
        if given.get(key) is not None:
            raise UnsupportedError(f"{where} has {key}, but {why}")
    if given.get("granularity", "default") != "default":
        raise UnsupportedError(
            f"{where} has granularity {given['granularity']!r}, but single weights are removed "
            "here; leave it out, and cut whole heads and neurons by vlp_plugins.hosts.torch_pruning"
        )
    if given.get("apply_method", "mul") != "mul":
        raise UnsupportedError(f"{where} has apply_method {given['apply_method']!r}; leave it out")
    if given.get("sparse_ratio") is None:
        raise SparsityError(
            f"{where} has no sparse_ratio; give the fraction to remove, such as 0.75"
        )
    # A schedule would notice the following in its last step only.
    for key in _AMOUNTS[:-1]:
        if given.get(key) is not None and not 0 <= given[key] <= 1:  # NaN is not either
            raise SparsityError(f"{where} has {key}={given[key]}; fractions lie in [0, 1]")
    most, least = given.get("max_sparse_ratio"), given.get("min_sparse_ratio")
    if given["sparse_ratio"] == 1 and most in (None, 1):
        raise SparsityError(f"{where} has sparse_ratio=1; the fraction removed lies in [0, 1)")
    if most is not None and least is not None and least > most:
        raise SparsityError(
            f"{where} has min_sparse_ratio={least:g} above max_sparse_ratio={most:g}"
            "; no ratio is between them"
        )
    return {key: given[key] for key in _AMOUNTS if given.get(key) is not None}


def _check_names(config: Mapping[str, Any], where: str, model: nn.Module) -> None:
    """Raises `UnsupportedError` for the first layer that an entry names and the model lacks."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name in (*(config.get("op_names") or ()), *(config.get("exclude_op_names") or ())):
        if name not in paths:
            raise UnsupportedError(
                f"{where} names {name!r}, which {type(model).__name__} does not have"
                f"{suggest(name, [path for path in paths if path][:2000])}"
            )


def _weights(
    config: Mapping[str, Any],
    where: str,
    model: nn.Module,
    adapter: Adapter,
    weights: WeightMap,
) -> dict[str, Weight]:
    """The weights that one entry selects, in the adapter's order."""
    _check_names(config, where, model)
    modules = dict(model.named_modules(remove_duplicate=False))
    explicit = config.get("op_names") or ()
    selectors = {key: config[key] for key in _SELECTORS if key in config}
    try:
        selected = select_modules_by_config(model, selectors)[0]
    except re.error as error:
        raise UnsupportedError(
            f"{where} has {error.pattern!r}, which is not a regular expression: {error}"
        ) from error
    by_path = {alias: weight for weight in weights.values() for alias in weight.aliases}
    found: set[str] = set()
    dense: dict[str, str] = {}
    for path in (path for path in modules if path in selected):
        own = [f"{path}.{name}" for name, _ in modules[path].named_parameters(recurse=False)]
        known = [by_path[each].name for each in own if each in by_path]
        found.update(known)
        if not known and (own or path in explicit):
            dense[path] = _reason_of(own, model, adapter)
    if named := [path for path in dense if path in explicit]:
        raise UnsupportedError(
            f"{where} names {named[0]!r}, which is not pruned: {dense[named[0]]}; leave it out"
        )
    if not found:
        raise UnsupportedError(
            f"{where} selects no weight that can be pruned{_examples_of(dense)}; weights are at "
            f"paths such as {next(iter(by_path))}"
        )
    if dense:
        _log.warning(
            "%s selects %d layers that stay dense%s (silence this by exclude_op_names_re)",
            where,
            len(dense),
            _examples_of(dense),
        )
    return {name: weight for name, weight in weights.items() if name in found}
