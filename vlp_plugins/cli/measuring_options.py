"""Options of the commands that measure a MODEL on data: `vlp id` and `vlp sensitivity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import Command, model_options

if TYPE_CHECKING:
    from vlp_plugins.jobs.inputs import ModelSource
    from vlp_plugins.jobs.recipes import DataRecipe


def data_options(*, batches: str) -> Callable[[Command], Command]:
    """MODEL, how it is loaded, and how data is read.

    Args:
        batches: what `--batches` says of itself.
    """
    options: list[Callable[[Command], Command]] = [
        click.argument("model"),
        click.option("--data", help="Image folder with captions, tar shards, data set."),
        click.option("--batches", type=click.IntRange(min=1), help=batches),
        click.option(
            "--batch-size", type=click.IntRange(min=1), default=32, show_default=True,
            help="Pairs in a batch.",
        ),
        click.option("--split", help="Of the data; the only one or train if left out."),
        click.option(
            "--shuffle-seed", type=click.IntRange(min=0),
            help="Mixes the data; stored order if left out.",
        ),
        click.option("--image-column", help="Of the data; found if left out."),
        click.option("--caption-column", help="Of the data; found if left out."),
        click.option("--max-length", type=click.IntRange(min=1), help="Most tokens of a caption."),
        click.option("--processor", help="Where the processor is, if not at the model."),
        model_options,
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def model_source(values: dict[str, Any]) -> ModelSource:
    """Takes what says how the model is loaded out of the values of the options."""
    from vlp_plugins.jobs.inputs import ModelSource

    names = ("model", "adapter", "processor", "dtype", "device")
    return ModelSource(**{name: values.pop(name) for name in names})


def data_recipe(values: dict[str, Any]) -> DataRecipe:
    """Takes what says how data is read out of the values of the options."""
    from vlp_plugins.jobs.recipes import DataRecipe

    names = ("split", "batch_size", "batches", "image_column", "caption_column", "max_length")
    found = {name: values.pop(name) for name in names}
    return DataRecipe(source=values.pop("data"), seed=values.pop("shuffle_seed"), **found)
