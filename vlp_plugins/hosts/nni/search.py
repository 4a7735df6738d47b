"""Checks the search space of an experiment against what is registered, before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.errors import RecipeError, UnknownNameError, UnsupportedError, VlpError, first_line
from vlp_plugins.hosts.nni.finetuning import check_finetuning
from vlp_plugins.hosts.nni.overlay import NAME, TrialSettings, flattened, overlay
from vlp_plugins.job import resolve_names
from vlp_plugins.recipes import Recipe
from vlp_plugins.recipes.lines import EXPONENT, yaml_way

Space = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Checked:
    """What was found to be right.

    Attributes:
        methods: that trials may prune with.
        draws: how many draws were tried: every alternative, and both ends of every range.
    """

    methods: tuple[str, ...]
    draws: int


def check_experiment(path: str | Path, recipe: Recipe, settings: TrialSettings) -> Checked:
    """Tries what a tuner may draw: names, parameters, types and ranges; loads no model.

    Every alternative of every choice and both ends of every range are tried, one at a time.

    Args:
        path: YAML of the experiment, as `nnictl create --config` takes it.
        recipe: of the trials.
        settings: of the trials.

    Raises:
        UnsupportedError: if NNI is not installed.
        RecipeError: says what a trial would stumble over.
    """
    config = _config(Path(path))
    space = config.search_space
    name = Path(path).name
    _check_tuner(name, config.tuner)
    _check_space(name, space)
    methods: dict[str, None] = {}
    count = 0
    for drawn in draws(space):
        count += 1
        try:
            trial, of_trial = overlay(recipe, settings, drawn)
            resolve_names(trial)
            check_finetuning(trial, of_trial)
        except VlpError as error:
            hint = _PLACE if isinstance(error, UnknownNameError) else ""
            raise RecipeError(
                f"{name}: a trial with {_said(drawn)} fails: {error}{hint}"
            ) from error
        methods[trial.method] = None
    return Checked(tuple(methods), count)


def draws(space: Space) -> Iterator[dict[str, Any]]:
    """Draws that together hold every alternative and every end of a range.

    The first alternative of everything, and for every other value one draw that differs in it.
    """
    base = {key: _values(spec)[0] for key, spec in space.items()}
    yield base
    for key, spec in space.items():
        for value in _values(spec)[1:]:
            yield base | {key: value}


def _values(spec: Mapping[str, Any]) -> list[Any]:
    """What may be drawn for one key: all alternatives, or the ends of a range."""
    kind, values = spec["_type"], list(spec["_value"])
    if kind == "choice":
        return [each for value in values for each in _alternatives(value)]
    if kind == "randint":
        return [values[0], values[1] - 1]
    if kind.endswith("normal"):
        middle = float(values[0])
        return [math.exp(middle) if "log" in kind else middle]
    return [float(value) for value in values[:2]]


def _alternatives(value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return [value]
    inner = {key: spec for key, spec in value.items() if key != NAME}
    return [{NAME: value[NAME], **drawn} for drawn in draws(inner)]


def _config(path: Path) -> Any:
    try:
        from nni.experiment.config import ExperimentConfig
    except ImportError as error:
        raise UnsupportedError(
            f'checking an NNI experiment needs NNI ({error}): pip install "vlp-plugins[nni]"'
        ) from error
    try:
        return ExperimentConfig.load(path).canonical_copy()
    except Exception as error:  # NNI raises whatever its parsers do
        raise RecipeError(f"{path} is no experiment of NNI: {first_line(error)}") from error


def _check_tuner(name: str, tuner: Any) -> None:
    """All that trials report is better the higher it is."""
    arguments = getattr(tuner, "class_args", None) or {}
    if arguments.get("optimize_mode", "maximize") != "maximize":
        raise RecipeError(
            f"{name}: the tuner's optimize_mode is {arguments['optimize_mode']!r}, but the higher "
            "the result of a trial, the better (of a loss it is the negative); write maximize"
        )


def _check_space(name: str, space: Any) -> None:
    """What NNI itself checks, in nested choices too, and what it lets pass."""
    from nni.common.hpo_utils import validate_search_space

    if not isinstance(space, Mapping):
        raise RecipeError(f"{name}: searchSpace must be a mapping of keys to {{_type, _value}}")
    for key, spec in space.items():
        if isinstance(spec, Mapping) and (found := _number_as_text(spec.get("_value"))):
            raise RecipeError(
                f"{name}: {key}: YAML takes {found[0]} for text; write {yaml_way(found)}"
            )
    try:
        validate_search_space(dict(space), raise_exception=True)
    except (ValueError, IndexError) as error:
        raise RecipeError(f"{name}: {first_line(error)}") from error
    for key, spec in space.items():
        nested = [each for each in spec["_value"] if isinstance(each, Mapping)]
        if nested and (len(nested) < len(spec["_value"]) or any(NAME not in v for v in nested)):
            raise RecipeError(
                f"{name}: of the alternatives of {key} all or none are written {{{NAME}: ...}}; "
                "NNI would hand the others' parameters over undrawn"
            )
        for each in nested:
            _check_space(name, {inner: value for inner, value in each.items() if inner != NAME})


def _number_as_text(values: Any) -> re.Match[str] | None:
    listed = values if isinstance(values, list) else []
    found = (EXPONENT.fullmatch(value) for value in listed if isinstance(value, str))
    return next(filter(None, found), None)


def _said(drawn: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in flattened(drawn).items()) or "nothing"


_PLACE = "; a parameter that not every pruner has belongs to its own: {_name: chita, lambda: ...}"
