"""Checks an experiment before it starts: its search space, its tuner, and what trials need.

NNI itself finds out while it runs what a tuner can search, and whether it maximises.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from nni.experiment.config import ExperimentConfig
from nni.experiment.config.utils import unset_base_path
from nni.tools.package_utils.config_manager import get_algo_meta, get_all_algo_meta
from nni.tools.package_utils.tuner_factory import create_builtin_class_instance

from vlp_plugins.hosts.nni.drawn_settings import NAME, TrialSettings, flattened, overlay
from vlp_plugins.hosts.nni.preflight import Preflight
from vlp_plugins.hosts.nni.trial import check_finetuning, warn_of_portal
from vlp_plugins.jobs.preparation import resolve_names
from vlp_plugins.jobs.recipe_values import EXPONENT, yaml_way
from vlp_plugins.jobs.recipes import Recipe
from vlp_plugins.runtime.errors import (
    RecipeError,
    UnknownNameError,
    VlpError,
    first_line,
    shown,
    suggest,
)

_log = logging.getLogger(__name__)

Space = Mapping[str, Mapping[str, Any]]

_TYPES = (
    "choice", "randint", "uniform", "quniform", "loguniform", "qloguniform", "normal", "qnormal",
    "lognormal", "qlognormal",
)  # fmt: skip

_OPERATORS = ";&|<>()"
"""Of a shell: they end a command."""
_DESCRIPTOR = re.compile(r"(?<=\s)\d+(?=[<>])")

_PLACE = "; a parameter that not every pruner has belongs to its own: {_name: chita, lambda: ...}"

_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Checked:
    """An experiment that was checked: the methods of its trials, and how many draws were tried."""

    methods: tuple[str, ...]
    draws: int


def check_experiment(path: str | Path, recipe: Recipe, settings: TrialSettings) -> Checked:
    """Tries what a tuner may draw, and checks what every trial needs; runs nothing.

    Every alternative of every choice and both ends of every range are tried, one at a time: names,
    parameters, types, and numbers of pairs. Model (by its configuration), processor, data and files
    are opened from the experiment's `trialCodeDirectory`, as trials do it; not where they run on
    other machines.

    Raises:
        RecipeError: says what would make a trial fail, and where it stands.
    """
    config = _config(Path(path))
    warn_of_portal()
    space = config.search_space
    name = Path(path).name
    tried = list(draws(space, f"{name}: searchSpace"))
    check_algorithms(name, config.tuner, config.assessor, space)
    trials: list[tuple[Mapping[str, Any], Recipe, TrialSettings]] = []
    for drawn in tried:
        with _failing(name, drawn):
            trial, of_trial = overlay(recipe, settings, drawn)
            resolve_names(trial)
            check_finetuning(trial, of_trial)
        trials.append((drawn, trial, of_trial))
    platform = getattr(config.training_service, "platform", None)
    if platform == "local":
        with chdir(config.trial_code_directory):
            try:
                preflight = Preflight.of(*trials[0][1:])
            except VlpError as error:
                raise RecipeError(f"{name}: every trial fails: {error}") from error
            for values, trial, of_trial in trials:
                with _failing(name, values):
                    preflight.check(trial, of_trial)
    else:
        _log.warning(
            "%s: trials run on %s machines; whether model and data are there is not looked into",
            name, platform or "several kinds of",
        )  # fmt: skip
    return Checked(tuple(dict.fromkeys(trial.method for _, trial, _ in trials)), len(trials))


def trial_words(path: str | Path) -> tuple[list[str], Path] | None:
    """What an experiment's `trialCommand` gives to `vlp nni-trial`, and the folder it runs in.

    None if it runs something else.

    Raises:
        RecipeError: if the file is not an experiment, or its command no line of a shell.
    """
    config = _config(Path(path))
    command = config.trial_command or getattr(config.training_service, "trial_command", None) or ""
    command = _DESCRIPTOR.sub("", os.path.expandvars(command))
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        raise RecipeError(f"{Path(path).name}: trialCommand {command!r}: {error}") from error
    if "nni-trial" not in words:
        return None
    ours = takewhile(lambda word: word[0] not in _OPERATORS, words[words.index("nni-trial") + 1 :])
    return list(ours), Path(config.trial_code_directory)


@contextmanager
def _failing(name: str, drawn: Mapping[str, Any]) -> Iterator[None]:
    """Names the trial in an error."""
    try:
        yield
    except VlpError as error:
        values = ", ".join(f"{key} {value}" for key, value in flattened(drawn).items())
        hint = _PLACE if isinstance(error, UnknownNameError) else ""
        raise RecipeError(
            f"{name}: a trial with {values or 'nothing'} fails: {error}{hint}"
        ) from error


def draws(space: Space, where: str = "searchSpace") -> Iterator[dict[str, Any]]:
    """Draws that together hold every alternative and every end of a range.

    The first alternative of everything, and for every other value one draw that differs in it.
    Where both ends are whole and what lies between need not be, a value between is among them. The
    last draw has the largest of all numbers: many batches and large ones, a floor and a sparsity.

    Raises:
        RecipeError: if a key has no type, or no values of it, in nested choices too. NNI checks
            some of it when the experiment runs, and most of that only to log it.
    """
    if not isinstance(space, Mapping):
        raise RecipeError(
            f"{where} must be a mapping of keys to {{_type, _value}}, not {shown(space)}"
        )
    values = {key: _values(f"{where}.{key}", str(key), spec) for key, spec in space.items()}
    base = {key: found[0] for key, found in values.items()}
    yield base
    for key, found in values.items():
        for value in found[1:]:
            yield base | {key: value}
    largest = {key: max(found) for key, found in values.items() if all(map(_is_number, found))}
    if len(largest) > 1 and base | largest != base:
        yield base | largest


def _values(at: str, key: str, spec: Any) -> list[Any]:
    """What may be drawn for one key: all alternatives, or what lies farthest apart in a range."""
    if not isinstance(spec, Mapping):
        raise RecipeError(
            f"{at} is a {type(spec).__name__}, expect a dict; a single value is written "
            f"{{_type: choice, _value: [{shown(spec)}]}}"
        )
    if set(spec) != {"_type", "_value"}:
        raise RecipeError(f"{at} must have _type and _value, not {', '.join(map(str, spec))}")
    kind, values = spec["_type"], spec["_value"]
    if kind not in _TYPES:
        raise RecipeError(
            f"{at} has unsupported type {shown(kind)}{suggest(shown(kind), list(_TYPES))}"
        )
    if not isinstance(values, list):
        raise RecipeError(f"{at}: _value must be a list, not {shown(values)}")
    texts = (EXPONENT.fullmatch(value) for value in values if isinstance(value, str))
    if found := next(filter(None, texts), None):
        raise RecipeError(f"{at}: YAML takes {found[0]} for text; write {yaml_way(found)}")
    return _alternatives(at, key, values) if kind == "choice" else _ends(at, kind, values)


def _alternatives(at: str, key: str, values: list[Any]) -> list[Any]:
    """Those of a choice; of one with parameters of its own all draws of these."""
    if not values:
        raise RecipeError(f"{at}: the choice is empty; write at least one value")
    nested = [value for value in values if isinstance(value, Mapping)]
    if nested and (len(nested) < len(values) or any(NAME not in value for value in nested)):
        raise RecipeError(
            f"{at}: of the alternatives of {key} all or none are written "
            f"{{{NAME}: ...}}; NNI would hand the others' parameters over undrawn"
        )
    found: list[Any] = []
    for number, value in enumerate(values):
        place = f"{at}._value[{number}]"
        if isinstance(value, Mapping):
            inner = {key: spec for key, spec in value.items() if key != NAME}
            found += [{NAME: value[NAME], **drawn} for drawn in draws(inner, place)]
        elif isinstance(value, (str, bool)) or _is_number(value):
            found.append(value)
        else:
            raise RecipeError(
                f"{place} must be a finite number, text, true, false, or "
                f"{{{NAME}: ...}}, not {shown(value)}"
            )
    return found


def _ends(at: str, kind: str, values: list[Any]) -> list[Any]:
    """What lies farthest apart in a range, and perhaps a value between."""
    _check_range(at, kind, values)
    if kind == "randint":
        return list(dict.fromkeys((int(values[0]), int(values[1]) - 1)))
    step = float(values[2]) if kind.startswith("q") else None
    if kind.endswith("normal"):
        # Nearly all draws lie within two standard deviations.
        middle, apart = float(values[0]), 2 * float(values[1])
        ends = [middle, middle - apart, middle + apart]
        ends = [math.exp(end) for end in ends] if "log" in kind else ends
        limits = (-math.inf, math.inf)
    else:
        ends = [float(value) for value in values[:2]]
        limits = (ends[0], ends[1])
    if step is not None:
        ends = [min(max(round(end / step) * step, limits[0]), limits[1]) for end in ends]
    ends = list(dict.fromkeys(ends))
    if all(end.is_integer() for end in ends):
        ends += _between(min(ends), max(ends), step)
    return ends


def _between(low: float, high: float, step: float | None) -> list[float]:
    """A value between two whole numbers that is not whole, if one can be drawn."""
    if step is None:
        return [low + min(0.5, (high - low) / 2)]
    after = (math.floor(low / step) + 1) * step
    return [value for value in (after, after + step) if value < high and not value.is_integer()][:1]


def _config(path: Path) -> Any:
    try:
        return ExperimentConfig.load(path).canonical_copy()
    except Exception as error:  # of any of its parsers
        raise RecipeError(f"{path} is not an experiment of NNI: {first_line(error)}") from error
    finally:
        unset_base_path()  # a file that NNI refuses leaves it set, and every later file would fail


def _check_range(at: str, kind: str, values: list[Any]) -> None:
    """A range of numbers: two ends, or mean and standard deviation, and a step after them."""
    expected = 3 if kind.startswith("q") else 2
    if len(values) != expected:
        raise RecipeError(f"{at}: {kind} must have {expected} values, not {shown(values)}")
    for value in values:
        whole = kind != "randint" or (_is_number(value) and value == int(value))
        if not _is_number(value) or not whole:
            what = "whole numbers" if kind == "randint" else "finite numbers"
            raise RecipeError(f"{at}: {kind} must have {what}, not {shown(value)}")
    low, high = values[:2]
    largest = max(abs(low), abs(high))
    if kind.endswith("normal"):
        if high <= 0:
            raise RecipeError(f"{at}: {kind} must have a standard deviation above 0, not {high}")
        largest = abs(low) + 2 * high
        if "log" in kind:
            if low + 2 * high > _LARGEST:
                raise RecipeError(
                    f"{at}: {kind} draws numbers too large for a float; its first value, {low}, is "
                    "the mean of the logarithm"
                )
            largest = math.exp(low + 2 * high)
    elif low >= high:
        raise RecipeError(f"{at}: {kind} must have high > low, not {shown(values)}")
    elif "log" in kind and low <= 0:
        raise RecipeError(f"{at}: {kind} must have ends above 0, not {low}")
    if expected == 3 and values[2] <= largest / sys.float_info.max:
        raise RecipeError(f"{at}: {kind} must have a step above 0, not {values[2]}")


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


_RANGES = frozenset({"randint", "uniform", "quniform", "loguniform", "qloguniform"})
_DRAWS = 3


@dataclass(frozen=True)
class _Tuner:
    """One of NNI's tuners.

    Attributes:
        nested: takes alternatives with parameters of their own.
        words: takes alternatives that are not numbers.
        ranges: types that it takes in addition to `choice`; None: all.
        mode: `optimize_mode` that it has if none is given; None: it does not look at results.
    """

    nested: bool = False
    words: bool = True
    ranges: frozenset[str] | None = None
    mode: str | None = "maximize"


_TUNERS = {
    "TPE": _Tuner(nested=True, mode="minimize"),
    "TPE_legacy": _Tuner(nested=True, mode="minimize"),
    "Anneal": _Tuner(nested=True, mode="minimize"),
    "Random": _Tuner(nested=True, mode=None),
    "GridSearch": _Tuner(nested=True, mode=None),
    "Evolution": _Tuner(nested=True),
    "SMAC": _Tuner(ranges=_RANGES - {"qloguniform"}),
    "DNGO": _Tuner(ranges=_RANGES),
    "Metis": _Tuner(words=False, ranges=frozenset({"randint", "uniform", "quniform"})),
    "GP": _Tuner(words=False, ranges=_RANGES),
}
_BUDGET = "gives every trial a budget, TRIAL_BUDGET, that no pruner has a use for"
_ARCHITECTURES = "searches architectures, not parameters"
_UNFIT = {
    "Batch": "hands over whole sets of parameters instead of drawing from a search space",
    "Hyperband": _BUDGET,
    "BOHB": _BUDGET,
    "PBT": "gives every trial folders of checkpoints to resume from, which no pruner does",
    "PPO": _ARCHITECTURES,
    "RegularizedEvolutionTuner": _ARCHITECTURES,
    "NetworkMorphism": _ARCHITECTURES,
}
_OTHERS = "take one of " + ", ".join(name for name, each in _TUNERS.items() if each.nested)
_MAXIMIZE = "classArgs: {optimize_mode: maximize}"


def check_algorithms(where: str, tuner: Any, assessor: Any, space: Mapping[str, Any]) -> None:
    """Checks that tuner and assessor of an `ExperimentConfig` maximise and can search the space.

    A tuner of the user's own, which NNI loads from a folder or has registered, passes with a
    warning that says what it must do; its code is not run.

    Raises:
        RecipeError: if they cannot, or do not; it says what to write.
    """
    for kind, algorithm in (("tuner", tuner), ("assessor", assessor)):
        if algorithm is None:
            continue
        arguments = algorithm.class_args or {}
        mode = arguments.get("optimize_mode", "maximize")
        if mode != "maximize":
            raise RecipeError(
                f"{where}: the {kind}'s optimize_mode is {mode!r}, but the higher the result of a "
                f"trial, the better (of a loss it is the negative); write `{_MAXIMIZE}`"
            )
        name = None if algorithm.class_name else _builtin(where, kind, algorithm.name)
        if name is None:
            _log.warning(
                "%s: the %s %s is not one of NNI's own and is not looked into: the higher a "
                "trial's result, the better, and what it draws must be what searchSpace says",
                where, kind, algorithm.class_name or algorithm.name,
            )  # fmt: skip
        elif kind == "tuner":
            _check_tuner(where, name, arguments, space)


def _builtin(where: str, kind: str, name: str) -> str | None:
    """The name of one of NNI's algorithms as NNI spells it; None for one that a user registered."""
    found = get_algo_meta(name)
    if found is None or found.algo_type != kind:
        known = [each.name for each in get_all_algo_meta() if each.algo_type == kind]
        known = [each for each in known if each not in _UNFIT]
        raise RecipeError(f"{where}: NNI has no {kind} {name!r}{suggest(name, known)}")
    return str(found.name) if found.is_builtin else None


def _check_tuner(
    where: str, name: str, arguments: Mapping[str, Any], space: Mapping[str, Any]
) -> None:
    if name in _UNFIT:
        raise RecipeError(f"{where}: tuner {name} {_UNFIT[name]}; {_OTHERS}")
    tuner = _TUNERS.get(name, _Tuner())
    if tuner.mode == "minimize" and "optimize_mode" not in arguments:
        raise RecipeError(
            f"{where}: tuner {name} minimises by default, but the higher the result of "
            f"a trial, the better; write `{_MAXIMIZE}` under tuner"
        )
    for key, spec in space.items():
        kind, values = spec["_type"], spec["_value"]
        at = f"{where}: searchSpace.{key}: tuner {name} takes no"
        if kind != "choice":
            if tuner.ranges is not None and kind not in tuner.ranges:
                allowed = ", ".join(sorted(tuner.ranges))
                raise RecipeError(f"{at} {kind}, only choice, {allowed}; {_OTHERS}")
        elif any(isinstance(value, Mapping) for value in values):
            if not tuner.nested:
                raise RecipeError(
                    f"{at} alternatives with parameters of their own ({{_name: ...}}); {_OTHERS}, "
                    "or write plain alternatives"
                )
        elif not tuner.words and any(isinstance(value, (str, bool)) for value in values):
            raise RecipeError(f"{at} alternatives that are not numbers; {_OTHERS}")
    _try(where, name, arguments, space)


def _try(where: str, name: str, arguments: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Lets the tuner itself draw a few times: it is NNI's, and raises what its libraries raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # NNI's log goes to standard output
    try:
        tuner = create_builtin_class_instance(name, dict(arguments), "tuners")
        tuner.update_search_space(dict(space))
        for number in range(_DRAWS):
            tuner.generate_parameters(number)
    except ImportError as error:
        raise RecipeError(
            f"{where}: tuner {name} needs a package that is missing ({error}): pip install "
            f'"nni[{name}]", or {_OTHERS}'
        ) from error
    except Exception as error:
        if type(error).__name__ == "NoMoreTrialError":  # a space smaller than the tries
            return
        raise RecipeError(
            f"{where}: tuner {name} cannot search this space with classArgs "
            f"{dict(arguments)} ({type(error).__name__}: {first_line(error)}); {_OTHERS}"
        ) from error
    finally:
        logging.disable(before)
