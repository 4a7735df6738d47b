"""What a file says, checked against the types that code relies on, and trusted from then on."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from vlp_plugins.runtime.errors import shown

_LARGEST = 2**63
"""No count, size or step is larger, and no tensor could hold it."""


def read_as(kind: Any, data: object, name: str) -> Any:
    """A value of JSON as the type that it must have.

    Lists become tuples and mappings dataclasses where those are asked for. Unknown keys are passed
    over: other versions may write more.

    Args:
        kind: as annotations have it: `bool`, `int`, `float`, `str`, `None`, `Any`, `Literal`, a
            union, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[K, V]` with keys of text or
            whole numbers, a dataclass, or a `TypedDict`.
        data: what the parser gave.
        name: what messages call the value.

    Raises:
        ValueError: naming the first value of another type, or that is missing.
    """
    if kind is Any:
        return data
    if kind is None or kind is types.NoneType:
        return _checked(data is None, data, name, "empty")
    if kind in (bool, str):
        return _checked(isinstance(data, kind), data, name, _WORDS[kind])
    if kind is int:
        whole = type(data) is int and -_LARGEST <= data < _LARGEST
        return _checked(whole, data, name, _WORDS[int])
    if kind is float:
        return _number(data, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(inner, data, name)
    if origin is Literal:
        return _checked(data in inner, data, name, f"one of {', '.join(map(repr, inner))}")
    if is_typeddict(kind) or is_dataclass(kind):
        return _record(kind, data, name)
    place = origin or kind
    if issubclass(place, Mapping):
        return _mapping(inner or (str, Any), data, name)
    items: Sequence[Any] = _checked(isinstance(data, list | tuple), data, name, "a list")
    kinds: tuple[Any, ...] = inner or (Any,)
    if issubclass(place, tuple) and inner[-1:] != (...,):
        _checked(len(items) == len(inner), data, name, f"a list of {len(inner)}")
    else:
        kinds = kinds[:1] * len(items)
    each = enumerate(zip(kinds, items, strict=True))
    found = [read_as(of, item, f"{name}[{at}]") for at, (of, item) in each]
    return tuple(found) if issubclass(place, tuple) else found


_WORDS = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}


def _checked(right: bool, data: object, name: str, expected: str) -> Any:
    if not right:
        raise ValueError(f"{name} is {shown(data)}, not {expected}")
    return data


def _number(data: object, name: str) -> float:
    with suppress(OverflowError):
        if isinstance(data, int | float) and not isinstance(data, bool):
            return float(data)
    raise ValueError(f"{name} is {shown(data)}, not a number")


def _one_of(kinds: Sequence[Any], data: object, name: str) -> Any:
    """The value as the first type that it can have."""
    for kind in kinds:
        with suppress(ValueError):
            return read_as(kind, data, name)
    words = [_WORDS.get(kind) or _named(get_origin(kind) or kind) for kind in kinds]
    raise ValueError(f"{name} is {shown(data)}, not {' or '.join(words)}")


def _named(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    return "empty" if kind is types.NoneType else "a list"


def _mapping(kinds: Sequence[Any], data: object, name: str) -> dict[Any, Any]:
    values: Mapping[str, Any] = _checked(isinstance(data, Mapping), data, name, "a mapping")
    of_keys, of = kinds
    found = {}
    for key, value in values.items():
        if of_keys is int and not (key.isdecimal() and len(key) < len(str(_LARGEST))):
            raise ValueError(f"{name} has {shown(key)}, which is no whole number")
        found[int(key) if of_keys is int else key] = read_as(of, value, f"{name}.{key:.80}")
    return found


def _record(kind: Any, data: object, name: str) -> Any:
    values: Mapping[str, Any] = _checked(isinstance(data, Mapping), data, name, "a mapping")
    found = {}
    for key, (of, needed) in _fields(kind).items():
        if key in values:
            found[key] = read_as(of, values[key], f"{name}.{key}")
        elif needed:
            raise ValueError(f"{name} has no {key}")
    return kind(**found)


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The types of a dataclass or TypedDict by key, and whether each must be there."""
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        return {key: (of, key in kind.__required_keys__) for key, of in hints.items()}
    return {
        each.name: (
            hints[each.name], each.default is MISSING and each.default_factory is MISSING
        )
        for each in fields(kind)
        if each.init
    }  # fmt: skip
