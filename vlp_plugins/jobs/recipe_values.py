"""YAML with line numbers, and the values read from it or from the command line."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vlp_plugins.runtime.errors import (
    RecipeError,
    VlpError,
    first_line,
    shown,
    suggest,
)
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.runtime.untrusted import check_read

logger = logging.getLogger(__name__)

# YAML 1.1, which PyYAML reads, wants a point in such numbers: 1e-5 is text, 1.0e-5 a number.
EXPONENT = re.compile(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)")
_MOST_LEVELS = 5
_MOST_BITS = 64  # of a whole number
_UNREAD = object()
_VALUE_BYTES = 1024  # that a value with its place takes, about


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a YAML file and where it stands.

    Attributes:
        data: text, number, bool or None; a list of values; or values by key.
        where: `recipe.yaml, line 3`.
        name: the key that it belongs to.
    """

    data: Any
    where: str
    name: str

    def wrong(self, expected: str) -> RecipeError:
        """The error that something else is expected here."""
        said = _said(self.data)
        return RecipeError(f"{self.where}: {self.name:.80} must be {expected}, not {said}")

    def items(self) -> Mapping[str, Value]:
        """The values of a mapping by key."""
        if not isinstance(self.data, dict):
            raise self.wrong("a mapping of keys to values")
        return self.data


def read_yaml(path: Path) -> Value:
    """Reads a YAML file that holds one mapping.

    Raises:
        RecipeError: if there is no such file, it is not YAML, or a key stands in it twice.
    """
    try:
        check_read(f"recipe {path}", path.stat().st_size, RecipeError)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text") from error
    except OSError as error:
        hint = "; a model is given by --model" if path.is_dir() else ""
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}{hint}") from error
    root = parse_yaml(text, str(path), path.name)
    if not isinstance(root.data, dict):
        raise RecipeError(
            f"{path} is not a recipe: it holds {_said(root.data)}, not lines such as "
            "`method: multiflow`"
        )
    return root


Reader = Callable[[Value], Any]
"""Makes a value of what stands at a key."""

Readers = Mapping[str, Reader]
"""By key that may stand in a section."""


def read_by(reader: Reader, default: Any = None) -> Any:
    """A field of a recipe, with what reads it."""
    return field(default=default, metadata={"reader": reader})


def readers_of(recipe: type) -> dict[str, Reader]:
    """The readers of the fields that `read_by` has made, by name."""
    return {each.name: each.metadata["reader"] for each in fields(recipe) if each.metadata}


def read_section(
    section: Value, readers: Readers, hint: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """The values of a section by key; a key with nothing behind it is left out.

    `hint` gives what an error says after an unknown key; without it the nearest is suggested.

    Raises:
        RecipeError: for an unknown key or a wrong value, with the line.
    """
    found = {}
    for key, value in section.items().items():
        if key not in readers:
            said = suggest(key, list(readers)) if hint is None else hint(key)
            raise RecipeError(f"{value.where}: unknown key {key!r:.80}{said}")
        if value.data is not None:  # `device:` alone means the default
            found[key] = readers[key](value)
    return found


def parse_yaml(text: str, source: str, name: str, *, hints: bool = True) -> Value:
    """The value that a text is in YAML; messages call it `name`, and the text `source`.

    With `hints` a warning names numbers that YAML takes for text.

    Raises:
        RecipeError: if it is not YAML, or its aliases stand for more values than memory holds.
    """
    try:
        loader = yaml.SafeLoader(text)  # reads the first characters
        node = loader.get_single_node()
        if node is None:
            return Value(None, source, name)
        values = _count(node, {})
        check_read(f"{source}: {values:,} values", values * _VALUE_BYTES, RecipeError)
        return _Tree(loader, source, hints).value(node, name)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(
            f"{source}{line}: not YAML ({error.problem or first_line(error)})"
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested far deeper than {_MOST_LEVELS} levels") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML ({first_line(error)})") from error


def yaml_way(found: re.Match[str]) -> str:
    """How YAML writes a number that `EXPONENT` has found."""
    return f"{found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}"


def value_of(data: Any, where: str, name: str) -> Value:
    """What Python has already, as if it had been read from a file; see `Value`."""
    if isinstance(data, Mapping):
        return Value({str(k): value_of(v, where, str(k)) for k, v in data.items()}, where, name)
    if isinstance(data, (list, tuple)):
        return Value([value_of(inner, where, name) for inner in data], where, name)
    return Value(data, where, name)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values with those that aliases repeat; a node in itself is found elsewhere."""
    if id(node) not in known:
        known[id(node)] = 0
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        parts = inner if isinstance(inner, list) else []
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


@dataclass(frozen=True, slots=True)
class _Tree:
    """Turns YAML nodes into values that know their line."""

    loader: yaml.SafeLoader
    source: str
    hints: bool

    def value(self, node: yaml.Node, name: str, level: int = 0) -> Value:
        where = self.where(node)
        if level > _MOST_LEVELS:  # an alias may contain itself
            raise RecipeError(f"{where}: nested deeper than {_MOST_LEVELS} levels")
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Value] = {}
            for key_node, inner in node.value:
                key = str(key_node.value)
                if key in values:
                    raise RecipeError(
                        f"{self.where(key_node)}: {key:.80} stands here a second time"
                    )
                values[key] = self.value(inner, key, level + 1)
            return Value(values, where, name)
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(inner, name, level + 1) for inner in node.value], where, name)
        data = self._scalar(node, name)
        unquoted = isinstance(node, yaml.ScalarNode) and node.style is None
        if isinstance(data, str) and unquoted and (found := EXPONENT.fullmatch(data)):
            if self.hints:
                message = "%s: %s is taken for a number; YAML writes it %s"
                logger.warning(message, where, data, yaml_way(found))
            data = float(data)
        return Value(data, where, name)

    def _scalar(self, node: yaml.Node, name: str) -> Any:
        """What stands for one value: text, a number, true, false or nothing."""
        data: Any = _UNREAD
        with suppress(Exception):  # PyYAML does not expect every text after `!!int` or `!!binary`
            data = self.loader.construct_object(node)
        fits = data is None or isinstance(data, (str, int, float))
        if not fits or (isinstance(data, int) and data.bit_length() > _MOST_BITS):
            raise RecipeError(
                f"{self.where(node)}: {name:.80} is {shown(str(node.value))}, which is not a "
                f"number of up to {_MOST_BITS} bits, true or false; write text like that in quotes"
            )
        return data

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}, line {node.start_mark.line + 1}"


def _said(data: Any) -> str:
    if data is None:
        return "empty"
    if isinstance(data, str):
        return f"the text {shown(data)}"
    if isinstance(data, dict):
        return f"a mapping with {', '.join(data) or 'nothing':.80}"
    if isinstance(data, Sequence):
        return f"a list of {len(data)}"
    return shown(data) if not isinstance(data, bool) else f"{str(data).lower()}"


_COMMAND_LINE = "command line"


def penalty_of(text: str, name: str) -> float | str:
    """A number or `auto`, as it would be read from a recipe; `RecipeError` for anything else."""
    return penalty(parse_yaml(text, _COMMAND_LINE, name, hints=False))


def amount_of(text: str, name: str) -> str:
    """An amount of memory, as it would be read from a recipe; `RecipeError` for anything else."""
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


def accepted(check: Callable[[str], object], *, named: bool = False) -> Callable[[Value], str]:
    """Reader of a text that a function takes without a `VlpError`; `named`: with the key in it."""

    def read(value: Value) -> str:
        found = text(value)
        try:
            check(found)
        except VlpError as error:
            where = f"{value.where}: {value.name}" if named else value.where
            raise RecipeError(f"{where}: {error}") from error
        return found

    return read


amount = accepted(bytes_of, named=True)
"""Reader of an amount of memory such as `8GiB`, or a number of bytes, as it is written."""


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
