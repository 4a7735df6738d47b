"""What NNI's tuners can search, and whether they maximise; NNI itself finds out while it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nni.tools.package_utils.config_manager import get_algo_meta, get_all_algo_meta
from nni.tools.package_utils.tuner_factory import create_builtin_class_instance

from vlp_plugins.runtime.errors import RecipeError, first_line, suggest

_log = logging.getLogger(__name__)

_RANGES = frozenset({"randint", "uniform", "quniform", "loguniform", "qloguniform"})
_DRAWS = 3


@dataclass(frozen=True)
class _Tuner:
    """One of NNI's tuners.

    Attributes:
        nested: takes alternatives with parameters of their own.
        words: takes alternatives that are no numbers.
        ranges: types that it takes besides `choice`; None: all.
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

    Args:
        where: what messages call the experiment.
        tuner: of the configuration.
        assessor: of the configuration, or None.
        space: well formed.

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
                "%s: the %s %s is none of NNI's own and not looked into: the higher a trial's "
                "result, the better, and what it draws must be what searchSpace says",
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
            f"{where}: tuner {name} minimises unless told otherwise, but the higher the result of "
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
            raise RecipeError(f"{at} alternatives that are no numbers; {_OTHERS}")
    _try(where, name, arguments, space)


def _try(where: str, name: str, arguments: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Lets the tuner itself draw a few times: it is NNI's, and raises what its libraries raise."""
    try:
        with _silent():
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


@contextmanager
def _silent() -> Iterator[None]:
    """Without NNI's log, which goes to standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
