"""Makes what was registered, with errors that name the allowed parameters."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Collection, Mapping
from numbers import Integral
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from vlp_plugins.plugins.offers import SINGULAR, Factory, Offer
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError
from vlp_plugins.targets import flag, reader_of

Made = TypeVar("Made")

_WHOLE = {"int", "None", "NoneType"}


def make(offer: Offer, parameters: Mapping[str, Any], expected: type[Made]) -> Made:
    """Calls the factory of an offer.

    Args:
        offer: what to make.
        parameters: keywords for its factory; `lambda`, which Python keeps for itself, is the
            factory's `lambda_`, and so for every other such word. Where the factory annotates a
            whole number, 3.0 is 3.
        expected: the class that the result must have.

    Raises:
        UnknownNameError: if it has no parameter of such a name; the message lists those it has.
        UnsupportedError: if a parameter is missing, is no whole number where one is wanted, is
            refused by the factory with a TypeError, or if the result is of another class.
    """
    what = f"{SINGULAR[offer.kind]} {offer.name!r}"
    allowed, open_ended = _keywords(offer.factory)
    parameters = _for_python(parameters, allowed, what)
    _check_flags(offer.factory, parameters, what)
    unknown = [_public(n) for n in parameters if n not in allowed and not open_ended]
    if unknown:
        raise UnknownNameError(f"{what} has no parameter {unknown[0]!r}; it takes {_list(allowed)}")
    missing = [_public(n) for n, required in allowed.items() if required and n not in parameters]
    if missing:
        raise UnsupportedError(
            f"{what} needs a value for {', '.join(missing)}; it takes {_list(allowed)}"
        )
    parameters = _with_whole_numbers(offer.factory, parameters, what)
    try:
        made = offer.factory(**parameters)
    except TypeError as error:
        raise UnsupportedError(
            f"{what} cannot be made with {dict(parameters)!r}: {error}; it takes {_list(allowed)}"
        ) from error
    if not isinstance(made, expected):
        raise UnsupportedError(
            f"{what} of {offer.distribution} is a {type(made).__name__}, not a "
            f"{expected.__module__}.{expected.__qualname__}; report it to {offer.distribution}"
        )
    return made


def _keywords(factory: Factory) -> tuple[dict[str, bool], bool]:
    """The keywords that a factory takes (true where required), and whether it takes any other."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # compiled callables have no signature
        return {}, True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in named},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def _check_flags(factory: Factory, parameters: Mapping[str, Any], what: str) -> None:
    """Refuses values of flags that are neither True nor False: "no" would count as true."""
    try:
        known = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return
    for name, value in parameters.items():
        if name in known and reader_of(known[name]) is flag:
            flag(f"{what}: {_public(name)}", value)


def _for_python(
    parameters: Mapping[str, Any], allowed: Collection[str], what: str
) -> dict[str, Any]:
    """The parameters under the names that the factory has for them."""
    renamed: dict[str, Any] = {}
    for name, value in parameters.items():
        ours = f"{name}_" if keyword.iskeyword(name) and f"{name}_" in allowed else name
        if ours in renamed:
            raise UnsupportedError(f"{what} is given {_public(ours)!r} twice; give it once")
        renamed[ours] = value
    return renamed


def _with_whole_numbers(
    factory: Factory, parameters: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The parameters with an int for every 3.0: YAML, JSON and tuners write whole numbers so."""
    annotations = _annotations(factory)
    found = dict(parameters)
    for name, value in parameters.items():
        kinds = _kinds(annotations.get(name))
        if isinstance(value, bool) or "int" not in kinds or "float" in kinds:
            continue
        if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
            found[name] = int(value)
        elif isinstance(value, float) or (isinstance(value, str) and kinds <= _WHOLE):
            raise UnsupportedError(f"{what}: {_public(name)}={value!r}; give a whole number")
    return found


def _annotations(factory: Factory) -> dict[str, Any]:
    """What a factory says about the types of its keywords; names that do not resolve stay text."""
    for resolve in (True, False):
        try:
            parameters = inspect.signature(factory, eval_str=resolve).parameters
        except Exception:  # evaluating an outsider's annotation raises whatever it raises
            continue
        return {name: parameter.annotation for name, parameter in parameters.items()}
    return {}


def _kinds(annotation: Any) -> set[str]:
    """The names of the types that an annotation allows: `int` and `None` of `int | None`."""
    if isinstance(annotation, str):
        return {kind.strip() for kind in annotation.split("|")}
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    return {kind.__name__ if isinstance(kind, type) else str(kind) for kind in kinds}


def _public(name: str) -> str:
    """The name that users write: without the underscore that only Python needs."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _list(allowed: Mapping[str, bool]) -> str:
    return ", ".join(map(_public, allowed)) if allowed else "no parameters"
