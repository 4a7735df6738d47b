"""Recipes of `vlp prune`: values, reading a file, and the command line that says the same."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlp_plugins.calibration.selections import selection_of
from vlp_plugins.jobs.recipe_values import (
    Readers,
    Value,
    accepted,
    amount,
    choice,
    flag,
    integer,
    number,
    penalty,
    plain,
    plain_of,
    read_by,
    read_section,
    read_yaml,
    readers_of,
    text,
    value_of,
)
from vlp_plugins.models.request import Target, check_sparsity
from vlp_plugins.runtime.errors import RecipeError, SparsityError, suggest
from vlp_plugins.scoring.allocation import allocation_by_name

LAMBDA = "lambda"
"""The parameter that has a key and an option of its own; `Recipe.parameters` holds it."""


@dataclass(frozen=True)
class DataRecipe:
    """Where batches come from; each key is an option, as of `Recipe`."""

    source: str | None = read_by(text)
    split: str | None = read_by(text)
    batch_size: int = read_by(integer(1), 32)
    batches: int | None = read_by(integer(1))
    seed: int | None = read_by(integer(0))
    image_column: str | None = read_by(text)
    caption_column: str | None = read_by(text)
    max_length: int | None = read_by(integer(3))
    prompt: str | None = read_by(text)
    max_pixels: int | None = read_by(integer(1))
    workers: int | None = read_by(integer(0))

    @property
    def of_processor(self) -> dict[str, Any]:
        """Keywords of `processor_for`."""
        return {name: getattr(self, name) for name in ("max_length", "prompt", "max_pixels")}


_DATA_READERS: Readers = readers_of(DataRecipe)
_OTHER_WORDS = {"ties": "owners", "output": "out", "params": "parameters", "dataset": "data"}


def _hint(key: str, readers: Readers, elsewhere: Readers, note: str) -> str:
    if key in _OTHER_WORDS:
        return f" (it is called {_OTHER_WORDS[key]!r})"
    return note if key in elsewhere else suggest(key, list(readers))


def _read_data(section: Value) -> dict[str, Any]:
    note = " (it does not belong under data:)"
    return read_section(
        section, _DATA_READERS, lambda key: _hint(key, _DATA_READERS, _READERS, note)
    )


def _data(value: Value) -> DataRecipe:
    if isinstance(value.data, str):
        return DataRecipe(source=value.data)
    return DataRecipe(**_read_data(value))


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


_allocation = accepted(allocation_by_name)
_tokens = accepted(selection_of)


def _pattern(value: Value) -> str:
    sizes = read_section(value, {"keep": integer(1), "of": integer(1)})
    if set(sizes) != {"keep", "of"}:
        raise value.wrong("a mapping with keep and of, such as {keep: 2, of: 4}")
    return _allocation(Value(f"keep={sizes['keep']},of={sizes['of']}", value.where, value.name))


DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTOCASTS = DTYPES[2:]


@dataclass(frozen=True)
class Recipe:
    """One run of `vlp prune`; each key is an option of it, explained in `cli.options`.

    None means that the option is not given: the default depends on the model, the method or the
    variant. There is one mask set for each target of `sparsity`, which is empty with a pattern.
    """

    model: str | None = read_by(text)
    adapter: str | None = read_by(text)
    processor: str | None = read_by(text)
    method: str = read_by(text, "multiflow")
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sparsity: tuple[Target, ...] = read_by(_sparsities, ())
    allocation: str | None = read_by(_allocation)
    floor: float = read_by(number, 0.0)
    owners: str | None = read_by(choice("all", "first"))
    variant: str = read_by(choice("default", "published"), "default")
    walk: str | None = read_by(choice("model", "blocks"))
    tokens: str | None = read_by(_tokens)
    data: DataRecipe = field(default_factory=DataRecipe)
    statistics: str | None = read_by(text)
    id_profile: str | None = read_by(text)
    out: str | None = read_by(text)
    seed: int = read_by(integer(0), 0)
    save_model: bool = read_by(flag, False)
    checkpoint_every: int = read_by(integer(1), 50)
    memory_budget: str | None = read_by(amount)
    autocast: str | None = read_by(choice(*AUTOCASTS))
    skip_nonfinite: bool = read_by(flag, False)
    keep_statistics: bool = read_by(flag, False)
    dtype: str = read_by(choice(*DTYPES), "auto")
    device: str | None = read_by(text)


_PATTERN = re.compile(r"keep=\d+,\s*of=\d+")
_READERS: Readers = readers_of(Recipe) | {
    "parameters": lambda value: {name: plain(each) for name, each in value.items().items()},
    "data": _data,
    "pattern": _pattern,
    LAMBDA: penalty,
}
KEYS = frozenset(_READERS)
"""Every key that a recipe may have at its top."""


_PACKAGED = Path(__file__).parents[1] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The recipes that the package brings, by name: `paper/multiflow-blip`, `nni/trial`, ..."""
    return {
        path.relative_to(_PACKAGED).with_suffix("").as_posix(): path
        for path in sorted(_PACKAGED.glob("*/*.yaml"))
    }


def find_recipe(name: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: a path, relative to a folder, or the name of one of the package.

    A file that exists wins over a name such as `paper/multiflow-blip`.

    Raises:
        RecipeError: if it is neither; suggests the nearest name, or lists them all.
    """
    path = folder / name
    if path.exists():
        return path
    packaged = packaged_recipes()
    wanted = Path(name).as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if wanted in packaged:
        return packaged[wanted]
    hint = ""
    if not path.suffix:
        near = suggest(wanted, list(packaged))
        hint = f", nor a recipe of the package{near}; vlp prune --recipes lists them"
    raise RecipeError(f"cannot read recipe {path}: No such file{hint}")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe, a file or one of the package; see `find_recipe`.

    Raises:
        RecipeError: for an unknown key (suggests the nearest) or a wrong value (says what was
            found), with the line.
    """
    return Recipe(**_found(read_yaml(find_recipe(path))))


def with_values(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """A new recipe with other values for some keys, nested and judged like those of a file.

    Values under `data` and `parameters` leave the other ones there as they are. Messages call the
    place that they come from `where`.

    Raises:
        RecipeError: see `load_recipe`.
    """
    root = value_of(values, where, "values")
    found = _found(root)
    section = root.items().get("data")
    if section is not None and isinstance(section.data, dict):
        found["data"] = replace(recipe.data, **_read_data(section))
    if "parameters" in found:
        found["parameters"] = {**recipe.parameters, **found["parameters"]}
    return replace(recipe, **found)


def _found(root: Value) -> dict[str, Any]:
    """What stands in a recipe, as keywords of `Recipe`."""
    note = " (it belongs under data:)"
    found = read_section(root, _READERS, lambda key: _hint(key, _READERS, _DATA_READERS, note))
    if "pattern" in found:
        if "allocation" in found:
            raise RecipeError(f"{root.where}: pattern and allocation exclude each other")
        found["allocation"] = found.pop("pattern")
    if LAMBDA in found:
        if LAMBDA in found.get("parameters", {}):
            raise RecipeError(f"{root.where}: lambda stands here and among the parameters")
        found["parameters"] = {**found.get("parameters", {}), LAMBDA: found.pop(LAMBDA)}
    return found


_KEYS = [
    key
    for each in fields(Recipe)
    for key in {
        "data": [f"data.{inner.name}" for inner in fields(DataRecipe)],
        "parameters": ["parameters", f"parameters.{LAMBDA}"],
    }.get(each.name, [each.name])
]
OPTIONS: dict[str, str] = {
    key: f"--{key.rpartition('.')[2].replace('_', '-')}" for key in _KEYS
} | {"parameters": "--parameter", "data.source": "--data", "data.seed": "--shuffle-seed"}
"""The option of `vlp prune` for every key of a recipe."""


def command_of(recipe: Recipe) -> str:
    """The command line that does what the recipe says; values that are the default are left out."""
    words = ["vlp", "prune"]
    standard = Recipe()
    for key, option in OPTIONS.items():
        value = value_at(recipe, key)
        if value == value_at(standard, key) and key != "method":
            continue
        if key == "parameters":
            for name, inner in value.items():
                if name == LAMBDA:
                    continue  # has an option of its own
                words += [option, f"{name}={_parameter_text(inner)}"]
        elif key == "sparsity":
            words += [option, *map(sparsity_text, value)]
        elif value is True:
            words.append(option)
        else:
            words += [option, str(value)]
    return shlex.join(words)


def with_options(recipe: Recipe, **options: Any) -> Recipe:
    """A new recipe with other values where an option is not None: the command line wins.

    Options go by the names of `OPTIONS`, with `_` for `-`: `batch_size=8`.

    Raises:
        RecipeError: for an option that does not exist.
    """
    keys = {option.strip("-").replace("-", "_"): key for key, option in OPTIONS.items()}
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"data": {}, "parameters": {}}
    for name, value in options.items():
        if name not in keys:
            raise RecipeError(f"unknown option {name!r}{suggest(name, list(keys))}")
        if value is not None:
            section, _, key = keys[name].rpartition(".")
            (parts[section] if section else top)[key] = value
    if parts["parameters"]:  # one parameter leaves the others as they are
        top["parameters"] = {**top.get("parameters", recipe.parameters), **parts["parameters"]}
    return replace(recipe, **top, data=replace(recipe.data, **parts["data"]))


def need(recipe: object, *keys: str) -> None:
    """Makes sure that some keys of a recipe are set, for instance `model` and `data.source`.

    Raises:
        RecipeError: names the first that is not, and how to set it.
    """
    for key in keys:
        if not value_at(recipe, key):
            section, _, inner = key.rpartition(".")
            line = f"{section}: {{{inner}: ...}}" if section else f"{key}: ..."
            option = OPTIONS.get(key, f"--{key}")
            raise RecipeError(f"no {key} given; pass {option}, or write `{line}` in the recipe")


def sparsity_of(text: str) -> Target:
    """A target as the command line has it: `0.75`, or `vision=0.5,text=0.8`.

    Raises:
        SparsityError: if it is neither, or outside [0, 1).
    """
    try:
        if "=" not in text:
            return check_sparsity(float(text))
        parts = [part.split("=", 1) for part in text.split(",")]
        return {name.strip(): check_sparsity(float(value)) for name, value in parts}
    except ValueError as error:
        raise SparsityError(
            f"{text!r} is not a sparsity; write 0.75, or vision=0.5,text=0.8 for budgets per "
            "modality"
        ) from error


def sparsity_or_pattern(texts: Sequence[str], allocation: str | None) -> dict[str, Any]:
    """Sparsities as the command line has them, or the pattern that stands in their place.

    Args:
        texts: of `--sparsity`.
        allocation: of `--allocation`.

    Returns:
        Values of the options `sparsity` and `allocation`.

    Raises:
        SparsityError: for what is neither, or a pattern together with another target or allocation.
    """
    patterns = [text for text in texts if _PATTERN.fullmatch(text)]
    if not patterns:
        return {"sparsity": tuple(map(sparsity_of, texts)) or None}
    if len(texts) > 1 or allocation is not None:
        raise SparsityError(
            f"--sparsity {patterns[0]} is a pattern, which fixes how much every layer loses; give "
            "it alone, without other sparsities and without --allocation"
        )
    return {"sparsity": None, "allocation": patterns[0]}


def sparsity_text(target: Target) -> str:
    """The inverse of `sparsity_of`."""
    if isinstance(target, Mapping):
        return ",".join(f"{name}={value!r}" for name, value in target.items())
    return repr(float(target))


def parameter_of(text: str) -> tuple[str, Any]:
    """A parameter of a method as the command line has it: `edges=false`.

    Raises:
        RecipeError: if it has no `=`.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise RecipeError(
            f"{text!r} is not a parameter; write name=value, for instance edges=false"
        )
    return name.strip(), plain_of(value, name.strip())


def _parameter_text(value: Any) -> str:
    if isinstance(value, str) and plain_of(value, "") == value:
        return value
    return json.dumps(value)


def value_at(recipe: object, key: str) -> Any:
    """What a recipe has at a key such as `data.source`."""
    found: Any = recipe
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name)
    return found
