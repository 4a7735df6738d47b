"""A recipe and a command line are two ways to write the same run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlp_plugins.models.request import Target, check_sparsity
from vlp_plugins.recipes.recipe import LAMBDA, Recipe
from vlp_plugins.recipes.values import plain_of
from vlp_plugins.runtime.errors import RecipeError, SparsityError, suggest

OPTIONS: dict[str, str] = {
    "model": "--model",
    "adapter": "--adapter",
    "processor": "--processor",
    "method": "--method",
    "parameters": "--parameter",
    "parameters.lambda": "--lambda",
    "sparsity": "--sparsity",
    "allocation": "--allocation",
    "floor": "--floor",
    "owners": "--owners",
    "variant": "--variant",
    "data.source": "--data",
    "data.split": "--split",
    "data.batch_size": "--batch-size",
    "data.batches": "--batches",
    "data.seed": "--shuffle-seed",
    "data.image_column": "--image-column",
    "data.caption_column": "--caption-column",
    "data.max_length": "--max-length",
    "statistics": "--statistics",
    "id_profile": "--id-profile",
    "out": "--out",
    "seed": "--seed",
    "save_model": "--save-model",
    "checkpoint_every": "--checkpoint-every",
    "memory_budget": "--memory-budget",
    "autocast": "--autocast",
    "skip_nonfinite": "--skip-nonfinite",
    "keep_statistics": "--keep-statistics",
    "dtype": "--dtype",
    "device": "--device",
}
"""The option of `vlp prune` for every key of a recipe."""


def command_of(recipe: Recipe) -> str:
    """The command line that does what the recipe says; values that are the default are left out."""
    words = ["vlp", "prune"]
    standard = Recipe()
    for key, option in OPTIONS.items():
        value = _get(recipe, key)
        if value == _get(standard, key) and key != "method":
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
    """The recipe with other values where an option is not None: the command line wins.

    Args:
        recipe: is left as it is.
        **options: by the names of `OPTIONS`, with `_` for `-`: `batch_size=8`.

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


def need(recipe: Recipe, *keys: str) -> None:
    """Makes sure that some keys are set, for instance `model` and `data.source`.

    Raises:
        RecipeError: names the first that is not, and how to set it.
    """
    for key in keys:
        if not _get(recipe, key):
            section, _, inner = key.rpartition(".")
            line = f"{section}: {{{inner}: ...}}" if section else f"{key}: ..."
            raise RecipeError(
                f"no {key} given; pass {OPTIONS[key]}, or write `{line}` in the recipe"
            )


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
            f"{text!r} is no sparsity; write 0.75, or vision=0.5,text=0.8 for budgets per modality"
        ) from error


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
        raise RecipeError(f"{text!r} is no parameter; write name=value, for instance edges=false")
    return name.strip(), plain_of(value, name.strip())


def _parameter_text(value: Any) -> str:
    if isinstance(value, str) and plain_of(value, "") == value:
        return value
    return json.dumps(value)


def _get(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name)
    return found
