"""From a YAML file to a recipe; every key is known, every value has the right type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlp_plugins.models.request import Target, check_sparsity
from vlp_plugins.recipes.lines import Value, read_yaml, value_of
from vlp_plugins.recipes.recipe import LAMBDA, DataRecipe, Recipe
from vlp_plugins.recipes.values import amount, choice, flag, integer, number, penalty, plain, text
from vlp_plugins.runtime.errors import RecipeError, SparsityError, suggest
from vlp_plugins.scoring.allocation import allocation_by_name

DTYPES = ("float32", "bfloat16", "float16")
AUTOCASTS = DTYPES[1:]


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe.

    Raises:
        RecipeError: for an unknown key (suggests the nearest) or a wrong value (says what was
            found), with the line.
    """
    return Recipe(**_found(read_yaml(Path(path))))


def with_values(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with other values for some keys, judged like those of a file.

    Values under `data` and `parameters` leave the other ones there as they are.

    Args:
        recipe: is left as it is.
        values: by key, nested as a recipe is.
        where: what messages call the place they come from.

    Raises:
        RecipeError: see `load_recipe`.
    """
    root = value_of(values, where, "values")
    found = _found(root)
    section = root.items().get("data")
    if section is not None and isinstance(section.data, dict):
        found["data"] = replace(recipe.data, **read_section(section, _DATA_READERS))
    if "parameters" in found:
        found["parameters"] = {**recipe.parameters, **found["parameters"]}
    return replace(recipe, **found)


def _found(root: Value) -> dict[str, Any]:
    """What stands in a recipe, as keywords of `Recipe`."""
    found = read_section(root, _READERS)
    if "pattern" in found:
        if "allocation" in found:
            raise RecipeError(f"{root.where}: pattern and allocation exclude each other")
        found["allocation"] = found.pop("pattern")
    if LAMBDA in found:
        if LAMBDA in found.get("parameters", {}):
            raise RecipeError(f"{root.where}: lambda stands here and among the parameters")
        found["parameters"] = {**found.get("parameters", {}), LAMBDA: found.pop(LAMBDA)}
    return found


def read_section(section: Value, readers: Mapping[str, Callable[[Value], Any]]) -> dict[str, Any]:
    """The values of a section by key; a key with nothing behind it is left out.

    Args:
        section: a mapping.
        readers: by key that may stand there, what makes a value of it.

    Raises:
        RecipeError: see `load_recipe`.
    """
    found = {}
    for key, value in section.items().items():
        if key not in readers:
            raise RecipeError(f"{value.where}: unknown key {key!r}{_hint(key, readers)}")
        if value.data is not None:  # `device:` alone means the default
            found[key] = readers[key](value)
    return found


def _hint(key: str, readers: Mapping[str, Callable[[Value], Any]]) -> str:
    if key in _OTHER_WORDS:
        return f" (it is called {_OTHER_WORDS[key]!r})"
    if readers is _READERS and key in _DATA_READERS:
        return " (it belongs under data:)"
    if readers is _DATA_READERS and key in _READERS:
        return " (it does not belong under data:)"
    return suggest(key, list(readers))


def _data(value: Value) -> DataRecipe:
    if isinstance(value.data, str):
        return DataRecipe(source=value.data)
    return DataRecipe(**read_section(value, _DATA_READERS))


def _sparsities(value: Value) -> tuple[Target, ...]:
    listed = value.data if isinstance(value.data, list) else [value]
    if not listed:
        raise value.wrong("a number such as 0.75, budgets by modality, or a list of them")
    return tuple(_target(inner) for inner in listed)


def _target(value: Value) -> Target:
    if isinstance(value.data, dict):
        if not value.data:
            raise value.wrong("a number, or budgets such as {vision: 0.5, text: 0.8}")
        return {name: _sparsity(inner) for name, inner in value.data.items()}
    return _sparsity(value)


def _sparsity(value: Value) -> float:
    try:
        return check_sparsity(number(value))
    except SparsityError as error:
        raise RecipeError(f"{value.where}: {error}") from error


def _pattern(value: Value) -> str:
    sizes = read_section(value, {"keep": integer(1), "of": integer(1)})
    if set(sizes) != {"keep", "of"}:
        raise value.wrong("a mapping with keep and of, such as {keep: 2, of: 4}")
    return _allocation(Value(f"keep={sizes['keep']},of={sizes['of']}", value.where, value.name))


def _allocation(value: Value) -> str:
    name = text(value)
    try:
        allocation_by_name(name)
    except SparsityError as error:
        raise RecipeError(f"{value.where}: {error}") from error
    return name


def _parameters(value: Value) -> dict[str, Any]:
    return {name: plain(inner) for name, inner in value.items().items()}


_DATA_READERS: dict[str, Callable[[Value], Any]] = {
    "source": text,
    "split": text,
    "batch_size": integer(1),
    "batches": integer(1),
    "seed": integer(0),
    "image_column": text,
    "caption_column": text,
    "max_length": integer(3),
}
_READERS: dict[str, Callable[[Value], Any]] = {
    "model": text,
    "adapter": text,
    "processor": text,
    "method": text,
    "parameters": _parameters,
    "sparsity": _sparsities,
    "allocation": _allocation,
    "pattern": _pattern,
    "floor": number,
    "owners": choice("all", "first"),
    "variant": choice("default", "published"),
    "data": _data,
    "statistics": text,
    "id_profile": text,
    "out": text,
    "seed": integer(0),
    "save_model": flag,
    "checkpoint_every": integer(1),
    "lambda": penalty,
    "memory_budget": amount,
    "autocast": choice(*AUTOCASTS),
    "skip_nonfinite": flag,
    "keep_statistics": flag,
    "dtype": choice(*DTYPES),
    "device": text,
}
KEYS = frozenset(_READERS)
"""Every key that a recipe may have at its top."""
_OTHER_WORDS = {"ties": "owners", "output": "out", "params": "parameters", "dataset": "data"}
