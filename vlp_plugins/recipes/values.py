"""Values read from YAML or from the command line, with errors that say what was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vlp_plugins.recipes.lines import EXPONENT, Value, parse_yaml
from vlp_plugins.runtime.errors import RecipeError, UnsupportedError
from vlp_plugins.runtime.memory import bytes_of

_COMMAND_LINE = "command line"


def penalty_of(text: str, name: str) -> float | str:
    """A number or `auto`, as it would be read from a recipe.

    Raises:
        RecipeError: for anything else.
    """
    return penalty(parse_yaml(text, _COMMAND_LINE, name, hints=False))


def amount_of(text: str, name: str) -> str:
    """An amount of memory, as it would be read from a recipe.

    Raises:
        RecipeError: for anything else.
    """
    return amount(Value(text, _COMMAND_LINE, name))


def plain_of(text: str, name: str) -> Any:
    """One value as it would be read from a recipe: `0.5`, `true`, `name`, `[1, 2]`."""
    return plain(parse_yaml(text, name, name, hints=False))


def text(value: Value) -> str:
    """Text; numbers count too, a folder may be named `2024`."""
    if isinstance(value.data, (str, int, float)) and not isinstance(value.data, bool):
        return str(value.data)
    raise value.wrong("text")


def integer(minimum: int) -> Callable[[Value], int]:
    """Reader of whole numbers from `minimum` on; 3.0, which tuners write, is 3."""

    def read(value: Value) -> int:
        found = value.data
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if type(found) is not int or found < minimum:
            raise value.wrong(f"a whole number from {minimum} on")
        return found

    return read


def number(value: Value) -> float:
    """A finite number; `1e-5`, which YAML takes for text, counts as one."""
    found = value.data
    if isinstance(found, str) and EXPONENT.fullmatch(found):
        found = float(found)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise value.wrong("a number")
    return float(found)


def penalty(value: Value) -> float | str:
    """A number, or `auto`: chosen by the method."""
    if value.data == "auto":
        return "auto"
    try:
        return number(value)
    except RecipeError as error:
        raise value.wrong("a number or auto") from error


def amount(value: Value) -> str:
    """An amount of memory such as `8GiB`, or a number of bytes, as it is written."""
    found = text(value)
    try:
        bytes_of(found)
    except UnsupportedError as error:
        raise RecipeError(f"{value.where}: {value.name}: {error}") from error
    return found


def flag(value: Value) -> bool:
    """True or false."""
    if not isinstance(value.data, bool):
        raise value.wrong("true or false")
    return value.data


def choice(*allowed: str) -> Callable[[Value], str]:
    """Reader of one of a few words."""

    def read(value: Value) -> str:
        if value.data not in allowed:
            raise value.wrong(f"one of {', '.join(allowed)}")
        return str(value.data)

    return read


def plain(value: Value) -> Any:
    """The value as Python has it, for keys that only a plug-in knows."""
    if isinstance(value.data, dict):
        return {key: plain(inner) for key, inner in value.data.items()}
    if isinstance(value.data, list):
        return [plain(inner) for inner in value.data]
    return value.data
