"""YAML with line numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlp_plugins.runtime.errors import RecipeError
from vlp_plugins.runtime.untrusted import check_read

logger = logging.getLogger(__name__)

# YAML 1.1, which PyYAML reads, wants a point in such numbers: 1e-5 is text, 1.0e-5 a number.
EXPONENT = re.compile(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)")
_MOST_LEVELS = 5
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
        return RecipeError(f"{self.where}: {self.name} must be {expected}, not {_said(self.data)}")

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
            f"{path} is no recipe: it holds {_said(root.data)}, not lines such as "
            "`method: multiflow`"
        )
    return root


def parse_yaml(text: str, source: str, name: str, *, hints: bool = True) -> Value:
    """The value that a text is in YAML.

    Args:
        text: YAML.
        source: what messages call it.
        name: what messages call the value.
        hints: warn about numbers that YAML takes for text.

    Raises:
        RecipeError: if it is not YAML, or its aliases stand for more values than memory holds.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Value(None, source, name)
        values = _count(node, {})
        check_read(f"{source}: {values:,} values", values * _VALUE_BYTES, RecipeError)
        return _Tree(loader, source, hints).value(node, name)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: not YAML ({error.problem or error})") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested far deeper than {_MOST_LEVELS} levels") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{source}: not YAML ({error})") from error
    finally:
        loader.dispose()


def yaml_way(found: re.Match[str]) -> str:
    """How YAML writes a number that `EXPONENT` has found."""
    return f"{found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}"


def value_of(data: Any, where: str, name: str) -> Value:
    """What Python has already, as if it had been read from a file.

    Args:
        data: text, number, bool, None, or lists and mappings of them.
        where: what messages call the place it comes from.
        name: what messages call the value.
    """
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
                    raise RecipeError(f"{self.where(key_node)}: {key} stands here a second time")
                values[key] = self.value(inner, key, level + 1)
            return Value(values, where, name)
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(inner, name, level + 1) for inner in node.value], where, name)
        data = self.loader.construct_object(node)
        unquoted = isinstance(node, yaml.ScalarNode) and node.style is None
        if isinstance(data, str) and unquoted and (found := EXPONENT.fullmatch(data)):
            if self.hints:
                message = "%s: %s is taken for a number; YAML writes it %s"
                logger.warning(message, where, data, yaml_way(found))
            data = float(data)
        return Value(data, where, name)

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}, line {node.start_mark.line + 1}"


def _said(data: Any) -> str:
    if data is None:
        return "empty"
    if isinstance(data, str):
        return f"the text {data!r}"
    if isinstance(data, dict):
        return f"a mapping with {', '.join(data) or 'nothing'}"
    if isinstance(data, Sequence):
        return f"a list of {len(data)}"
    return f"{data!r}" if not isinstance(data, bool) else f"{str(data).lower()}"
