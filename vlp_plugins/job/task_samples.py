"""From the data of a task to the samples that a model is fine-tuned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlp_plugins.data.batches import captioned, first
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.sources import open_source
from vlp_plugins.recipes.finetuning import FinetuneRecipe
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks.finetuning.samples import Sample


@dataclass(frozen=True)
class TaskSamples:
    """The data of a task.

    Attributes:
        description: what was read.
        samples: in stored order; no image is decoded yet.
        classes: names of the classes, or their numbers as text; empty for other tasks.
    """

    description: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()


def read_samples(recipe: FinetuneRecipe) -> TaskSamples:
    """Reads lists and annotations; see `open_source`, `open_questions` and `open_labelled`.

    Args:
        recipe: says which task, and where its data is.

    Raises:
        RecipeError: if it does not.
        DataError: if it is not there, or not data of the task.
    """
    recipe.check()
    return _READERS[str(recipe.task)](recipe)


def _captions(recipe: FinetuneRecipe) -> TaskSamples:
    opened = open_source(
        str(recipe.data),
        split=recipe.split,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        captions="all",
    )
    found = captioned(opened, recipe.limit)
    samples = (Sample(record.place, record.image, tuple(texts)) for record, texts in found)
    return TaskSamples(opened.description, tuple(samples))


def _questions(recipe: FinetuneRecipe) -> TaskSamples:
    found = open_questions(str(recipe.data), recipe.split)
    items = list(first(found.items, recipe.limit, found.description))
    lacking = next((item.place for item in items if not item.answers), None)
    if lacking is not None:
        raise DataError(
            f"{found.description}: {lacking} has no answers to learn (those of test sets are not "
            "published); give another --split"
        )
    samples = (Sample(item.place, item.image, (item.text,), item.answers) for item in items)
    return TaskSamples(found.description, tuple(samples))


def _labelled(recipe: FinetuneRecipe) -> TaskSamples:
    found = open_labelled(str(recipe.data), recipe.split)
    items = list(first(found.items, recipe.limit, found.description))
    if not items:
        raise DataError(f"{found.description} holds no image")
    count = max(item.label for item in items) + 1
    names = found.classes or tuple(map(str, range(count)))
    samples = (Sample(item.place, item.image, label=item.label) for item in items)
    return TaskSamples(found.description, tuple(samples), names)


_READERS: dict[str, Callable[[FinetuneRecipe], TaskSamples]] = {
    "retrieval": _captions,
    "captioning": _captions,
    "vqa": _questions,
    "classification": _labelled,
}
