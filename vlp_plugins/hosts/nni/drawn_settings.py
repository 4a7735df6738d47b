"""From what a tuner draws to a recipe: which pruner, how sparse, with which parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vlp_plugins.jobs.recipe_values import integer, number, value_of
from vlp_plugins.jobs.recipes import KEYS, DataRecipe, Recipe, with_values
from vlp_plugins.runtime.errors import RecipeError
from vlp_plugins.scoring.factors import GUIDED

Metric = Literal["auto", "recall", "loss"]

PAIRS = 512
"""How many pairs a trial measures on by default."""

NAME = "_name"
"""The key under which NNI gives the chosen alternative of a nested choice."""
DRAWN = (
    "pruner", "method", "id", "parameters", "lambda", "sparsity", "allocation", "pattern", "floor",
    "owners", "variant", "walk", "tokens", "seed", "autocast", "dtype", "skip_nonfinite",
    "data.batches", "data.batch_size", "data.seed", "data.max_length", "data.prompt",
    "data.max_pixels", "finetune_steps", "learning_rate",
)  # fmt: skip
"""What a tuner may draw; any key that is none of a recipe's is a parameter of the method.

A closed list: the portal of NNI takes parameters of trials from anyone who reaches its port, so
nothing that names a file, or has one written, is in it.
"""
_WHERE = "search space"
_PRUNERS = ("pruner", "method")
_OWN = {"finetune_steps": integer(0), "learning_rate": number}
_DATA = frozenset(each.name for each in fields(DataRecipe))
_WORD = re.compile(r"[\w+*-]*")


@dataclass(frozen=True)
class TrialSettings:
    """What a trial does in addition to pruning.

    Attributes:
        test: where the pairs come from that are measured on; None: those of the recipe's data
            that follow the ones it reads.
        pairs: how many of them, in whole batches; None: `PAIRS`, or as many as there are.
        metric: `recall`, `loss`, or `auto`: recall if the adapter embeds images and texts.
        finetune_steps: steps of fine-tuning after pruning; a search space may draw it.
        learning_rate: of fine-tuning; a search space may draw it.
        report_every: steps between two intermediate results.
    """

    test: str | None = None
    pairs: int | None = None
    metric: Metric = "auto"
    finetune_steps: int = 0
    learning_rate: float = 1e-5
    report_every: int = 50


def overlay(
    recipe: Recipe, settings: TrialSettings, drawn: Mapping[str, Any]
) -> tuple[Recipe, TrialSettings]:
    """A recipe and settings with the drawn values in place of their own.

    `pruner` (or `method`) names the method, `id` says whether intrinsic dimensions guide it, keys
    of a recipe that are in `DRAWN` are those (`data.batches` and `sparsity.vision` with a point),
    `finetune_steps` and `learning_rate` are settings, and anything else is a parameter of the
    method: a number, true, false or a word. What a nested choice (`{_name: chita, lambda: 0.1}`)
    brings counts as if it stood next to it. Parameters in the recipe are those of its own method:
    another pruner starts without.

    Raises:
        RecipeError: if a value is of the wrong type, drawn twice, or not for a tuner to draw; or if
            there is not exactly one sparsity.
    """
    if not isinstance(drawn, Mapping):
        raise RecipeError(f"{_WHERE}: a trial is given values by key, not {drawn!r:.80}")
    flat = flattened(drawn)
    recipe = _with_method(recipe, flat)
    own: dict[str, Any] = {
        name: read(value_of(flat.pop(name), _WHERE, name))
        for name, read in _OWN.items()
        if name in flat
    }
    nested = _nested(flat)
    _check_drawn(nested)
    recipe = with_values(recipe, nested, _WHERE)
    if len(recipe.sparsity) > 1:
        raise RecipeError(
            f"a trial makes one set of masks, but the recipe has {len(recipe.sparsity)} "
            "sparsities; give one, or let the search space choose: "
            "`sparsity: {_type: choice, _value: [0.63, 0.75]}`"
        )
    return recipe, replace(settings, **own)


def flattened(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The values by key, those of nested choices among the others.

    Raises:
        RecipeError: if a key stands there twice.
    """
    flat: dict[str, Any] = {}
    for key, value in drawn.items():
        found = {key: value}
        if isinstance(value, Mapping) and NAME in value:
            inner = {name: each for name, each in value.items() if name != NAME}
            found = {key: value[NAME]} | flattened(inner)
        if twice := found.keys() & flat.keys():
            raise RecipeError(f"{_WHERE}: {min(twice)!r} is drawn twice; draw it in one place")
        flat |= found
    return flat


def _with_method(recipe: Recipe, flat: dict[str, Any]) -> Recipe:
    """Takes what names the method out of the values."""
    names = {key: flat.pop(key) for key in _PRUNERS if key in flat}
    if len(names) > 1:
        raise RecipeError(f"{_WHERE}: pruner and method are the same; draw one of them")
    name = next(iter(names.values()), recipe.method)
    if not isinstance(name, str):
        raise RecipeError(
            f"{_WHERE}: pruner must be a name, not {name!r}; where one alternative of a choice has "
            "parameters, all are written {_name: multiflow}"
        )
    guided = flat.pop("id", name.startswith(GUIDED))
    if not isinstance(guided, bool):
        raise RecipeError(f"{_WHERE}: id must be true or false, not {guided!r}")
    plain = name.removeprefix(GUIDED)
    if plain != recipe.method.removeprefix(GUIDED):
        recipe = replace(recipe, parameters={})
    return replace(recipe, method=f"{GUIDED}{plain}" if guided else plain)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a recipe has them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, inner = key.partition(".")
        if section not in KEYS:
            section, inner = "parameters", key
        place, name = (nested.setdefault(section, {}), inner) if inner else (nested, section)
        if not isinstance(place, dict) or name in place:
            raise RecipeError(f"{_WHERE}: {section!r} is drawn twice; draw it in one place")
        place[name] = value
    return nested


def _check_drawn(nested: Mapping[str, Any]) -> None:
    """Makes sure that a tuner may draw these values of a recipe."""
    data = nested.get("data", {})
    within = [f"data.{name}" for name in data if name in _DATA] if isinstance(data, Mapping) else ()
    keys = [key for key in nested if key != "data" or not isinstance(data, Mapping)]
    if refused := next((key for key in (*keys, *within) if key not in DRAWN), None):
        raise RecipeError(
            f"{_WHERE}: {refused} can be set in the recipe only, not by a tuner; in addition to "
            f"parameters of the method it may draw {', '.join(DRAWN)}"
        )
    for name, value in _texts(nested.get("parameters", {}), "parameters"):
        if not _WORD.fullmatch(value):
            raise RecipeError(
                f"{_WHERE}: {name} {value!r:.80} is not a plain word; what a tuner draws names no "
                "file, so write such a value in the recipe, under parameters"
            )


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every text in a value, with the key that it stands under."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, key)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, name)
