"""Recipes of `vlp finetune`, written in YAML; every key is an option of the command.

    task: retrieval
    batch_size: 128
    epochs: 6
    learning_rate: 1.0e-5
    weight_decay: 0.05
    schedule: cosine

Model, masks and output folder are given on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlp_plugins.jobs.recipe_values import (
    Readers,
    Value,
    choice,
    integer,
    number,
    read_by,
    read_section,
    read_yaml,
    readers_of,
    text,
)
from vlp_plugins.jobs.recipes import AUTOCASTS, find_recipe
from vlp_plugins.runtime.errors import RecipeError, suggest
from vlp_plugins.tasks import TASKS
from vlp_plugins.tasks.finetuning.settings import RATES, FinetuneSettings


@dataclass(frozen=True)
class FinetuneRecipe:
    """One run of `vlp finetune`.

    Attributes:
        adapter: name; None asks all.
        batch_size: rows of a step, of all processes and accumulated batches together.
        data: folder, file or id of the data set.
        split: of the data; None takes the only one, or `train`.
        limit: images (questions) that are trained on, the first ones; None for all.
        image_column: of captioned images; None finds it.
        caption_column: of captioned images; None finds it.
        max_length: most tokens of a text; None asks the tokenizer.
        checkpoint_every: steps from one state to the next.
        log_every: steps that a line of the loss log is the mean of.
        workers: threads of a process that decode images ahead.
        settings: of the optimizer and its rate.
    """

    task: str | None = read_by(choice(*TASKS))
    adapter: str | None = read_by(text)
    batch_size: int = read_by(integer(1), 32)
    data: str | None = read_by(text)
    split: str | None = read_by(text)
    limit: int | None = read_by(integer(1))
    image_column: str | None = read_by(text)
    caption_column: str | None = read_by(text)
    max_length: int | None = read_by(integer(3))
    checkpoint_every: int = read_by(integer(1), 500)
    log_every: int = read_by(integer(1), 10)
    workers: int = read_by(integer(0), 1)
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)


def load_finetune_recipe(path: str | Path) -> FinetuneRecipe:
    """Reads a recipe of fine-tuning, a file or one of the package; see `find_recipe`.

    Raises:
        RecipeError: for an unknown key (suggests the nearest) or a wrong value (says what was
            found), with the line.
    """
    found = read_section(
        read_yaml(find_recipe(path)),
        _READERS,
        lambda key: f" of fine-tuning{suggest(key, list(_READERS))}",
    )
    return with_finetune_options(FinetuneRecipe(), **found)


def with_finetune_options(recipe: FinetuneRecipe, **values: Any) -> FinetuneRecipe:
    """A new recipe with other values, by its keys, where one is not None.

    Raises:
        RecipeError: if a value is out of range, or a key unknown.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if unknown := next((name for name in given if name not in _READERS), None):
        raise RecipeError(f"unknown option {unknown!r}{suggest(unknown, list(_READERS))}")
    inner = {name: given.pop(name) for name in _SETTINGS if name in given}
    return replace(recipe, **given, settings=replace(recipe.settings, **inner))


def _pair(value: Value) -> tuple[float, float]:
    if not isinstance(value.data, list) or len(value.data) != 2:
        raise value.wrong("a list of two numbers, such as [0.9, 0.999]")
    one, two = map(number, value.data)
    return one, two


_SETTINGS = tuple(each.name for each in fields(FinetuneSettings))
_READERS: Readers = readers_of(FinetuneRecipe) | {
    "learning_rate": number,
    "betas": _pair,
    "epsilon": number,
    "weight_decay": number,
    "schedule": choice(*RATES),
    "warmup": number,
    "epochs": integer(1),
    "steps": integer(1),
    "accumulate": integer(1),
    "clip": number,
    "autocast": choice(*AUTOCASTS),
    "seed": integer(0),
}
