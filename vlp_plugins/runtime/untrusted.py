"""Files of unknown origin: what they may take and name, and what they say, checked by type."""

from __future__ import annotations

import errno
import os
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from vlp_plugins.runtime.errors import DataError, UnsupportedError, shown
from vlp_plugins.runtime.memory import bytes_of, text_of

LIMIT_VARIABLE = "VLP_READ_LIMIT"
OUTSIDE_VARIABLE = "VLP_READ_OUTSIDE"
_LIMIT = "256MiB"


def read_limit() -> int:
    """Bytes that one thing which a file describes may take beyond the bytes that the file has.

    A picture, a member of an archive, a recipe, tensors, a model: a few kilobytes can describe
    more than any memory holds. The environment variable `VLP_READ_LIMIT` sets it, as in `4GiB`;
    without it, it is 256 MiB.

    Raises:
        UnsupportedError: if the variable is not an amount of memory.
    """
    try:
        return bytes_of(os.environ.get(LIMIT_VARIABLE) or _LIMIT)
    except UnsupportedError as error:
        raise UnsupportedError(f"{LIMIT_VARIABLE}: {error}") from error


def check_read(what: str, size: int, error: type[Exception], *, stored: int = 0) -> None:
    """Checks, before memory is taken, that what a file describes is within `read_limit`.

    `stored` are the bytes that the file has for it, `size` those that it will take.

    Raises:
        Exception: of type `error`, if it takes more.
    """
    if size > stored + read_limit():
        raise error(
            f"{what} would take {text_of(size)} of memory, which is over the limit of "
            f"{text_of(stored + read_limit())}; if you trust the file, raise it, as in "
            f"{LIMIT_VARIABLE}={-(-size // 2**20)}MiB"
        )


def check_inside(
    path: str | os.PathLike[str],
    folders: Path | Sequence[Path],
    source: object,
    error: type[Exception] = DataError,
) -> None:
    """Checks that a path which a file names lies in a folder; links in the folder may lead out.

    `VLP_READ_OUTSIDE=1` (or `true`, `yes`) in the environment allows any path.

    Args:
        path: absolute, or relative to the working directory as the folders are.
        folders: that it may lie in, one or several.
        source: the file that names the path, for messages.
        error: what is raised.

    Raises:
        Exception: of type `error`, if it lies elsewhere.
        UnsupportedError: if the variable says neither yes nor no.
    """
    if _outside_allowed():
        return
    # Without resolving links: a link that the user put into the folder is the user's choice.
    places = [folders] if isinstance(folders, Path) else folders
    lies = Path(os.path.abspath(path))  # noqa: PTH100
    if not any(lies.is_relative_to(os.path.abspath(place)) for place in places):  # noqa: PTH100
        raise error(
            f"{source} names {os.fspath(path):.300}, which is outside of "
            f"{' and '.join(map(str, places))}; link its folder there, or set "
            f"{OUTSIDE_VARIABLE}=1 if you trust the file"
        )


def is_file(path: Path) -> bool:
    """True for a file; False also for a name that a file names and that no file can have."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _outside_allowed() -> bool:
    value = os.environ.get(OUTSIDE_VARIABLE, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise UnsupportedError(f"{OUTSIDE_VARIABLE}={value!r}; set it to 1 or 0")


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
            raise ValueError(f"{name} has {shown(key)}, which is not a whole number")
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
