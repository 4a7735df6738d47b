"""What the paper spends on pruning and on fine-tuning, for models and data of one's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.papers.tuning import Tuning
from benchmarks.papers.ways import LAMBDA, SIZED, Way
from vlp_plugins.jobs.finetune import load_finetune_recipe, rows_of_a_batch, with_finetune_options
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, load_recipe, packaged_recipes
from vlp_plugins.scoring.factors import GUIDED

RERANK = 256
"""Candidates that the published BLIP and X-VLM order on COCO."""
DIMENSION_SAMPLES = 2000
"""What the paper of intrinsic dimensions measures them with."""
_ROUND = {"itersnip": "batches_per_round", "chita++": "rows"}
"""What says how many batches a round has."""
_LIKE = {"blip": "tamt-blip", "xvlm": "tamt-xvlm", "vit": "multiflow-dino"}
"""Whose data a method gets that the paper does not have."""
_OF_IMAGES = {
    "multiflow-128-images": "multiflow-dino-128-images",
    "multiflow-3000-images": "multiflow-dino",
}
"""By way of the small ViT the recipe with as many images as the paper has."""


def way_of(model: str, way: Way, prune: Mapping[str, int]) -> Way:
    """With the data and the rounds of the paper; what else it is made of stays.

    Args:
        model: family.
        way: of the small models.
        prune: `batches`, at most, and `batch_size` instead of the paper's.
    """
    if way in SIZED:
        return replace(way, parameters=_with_own_penalty(way.parameters))
    recipe, data = _recipe(model, way)
    batches = min(data.batches or 0, prune.get("batches", sys.maxsize))
    size = prune.get("batch_size", data.batch_size)
    parameters = _with_own_penalty({**recipe.parameters, **way.parameters})
    if "steps" in parameters:
        parameters["steps"] = batches
    if "rounds" in parameters:
        rounds = min(int(recipe.parameters["rounds"]), batches)
        parameters |= {"rounds": rounds, _ROUND[way.method]: batches // rounds}
    samples = batches * size
    guided = way.method.startswith(GUIDED) or way.options.get("allocation") == "id"
    return replace(
        way,
        name=f"multiflow-{samples}-images" if way.name in _OF_IMAGES else way.name,
        parameters=parameters,
        samples=samples,
        batch_size=size,
        dimensions=min(DIMENSION_SAMPLES, samples) if guided else 0,
    )


def tuning_of(model: str, task: str, changed: Mapping[str, Any]) -> Tuning:
    """The paper's recipe: Table 11, and for the ViT that of its Section A.2.

    Args:
        model: family.
        task: or the set of images to classify.
        changed: values of `vlp finetune`, and `measured` and `rerank`, instead of the paper's.

    Raises:
        RecipeError: if a step cannot be shared out among its parts.
    """
    settings = dict(changed)
    measured = settings.pop("measured", 0)
    rerank = settings.pop("rerank", RERANK if task == "retrieval" else 0)
    name = "finetune-dino" if model == "vit" else f"finetune-{model}-{task}"
    found = with_finetune_options(load_finetune_recipe(f"paper/{name}"), **settings)
    rows_of_a_batch(found)  # refuses what cannot be shared out, before anything is run
    made = found.settings
    return Tuning(
        str(found.task),
        task,
        made.steps or 0,
        made.learning_rate,
        made.betas,
        made.weight_decay,
        made.schedule,
        made.warmup,
        found.batch_size,
        measured=measured,
        rerank=rerank,
        epochs=made.epochs,
        accumulate=made.accumulate,
    )


def _recipe(model: str, way: Way) -> tuple[Recipe, DataRecipe]:
    """The paper's, and the data that it reads."""
    method = way.method.removeprefix(GUIDED)
    name = _OF_IMAGES.get(way.name, f"{method}-{'dino' if model == 'vit' else model}")
    like = load_recipe(f"paper/{_LIKE[model]}")
    recipe = load_recipe(f"paper/{name}") if f"paper/{name}" in packaged_recipes() else like
    return recipe, recipe.data if recipe.data.batches else like.data  # allocations read some, too


def _with_own_penalty(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """CHITA chooses the penalty itself where it would be that of the small models."""
    made = dict(parameters)
    if made.get("lambda") == LAMBDA:
        made["lambda"] = "auto"
    return made
