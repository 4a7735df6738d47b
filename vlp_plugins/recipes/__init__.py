"""Recipes: what `vlp prune` shall do, written in YAML.

    model: path/or/hub-id
    method: multiflow
    sparsity: [0.63, 0.75, 0.9]
    data:
      source: photos/
      batch_size: 32
    out: pruned/

Every key is an option of the command, and the other way round: `command_of` writes the command
that does the same. Paths are relative to the current folder, as on the command line.
"""

from __future__ import annotations

from vlp_plugins.recipes.command import (
    OPTIONS,
    command_of,
    need,
    parameter_of,
    sparsity_of,
    with_options,
)
from vlp_plugins.recipes.reading import KEYS, load_recipe, with_values
from vlp_plugins.recipes.recipe import DataRecipe, Recipe
from vlp_plugins.recipes.values import amount_of, penalty_of

__all__ = [
    "KEYS",
    "OPTIONS",
    "DataRecipe",
    "Recipe",
    "amount_of",
    "command_of",
    "load_recipe",
    "need",
    "parameter_of",
    "penalty_of",
    "sparsity_of",
    "with_options",
    "with_values",
]
