"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vlp_plugins.jobs.inputs import ModelSource
    from vlp_plugins.jobs.recipes import DataRecipe, Recipe


Command = Callable[..., Any]
Option = Callable[[Command], Command]

_NUMBER = re.compile(r"-\.?\d")
_RECIPE = (".yaml", ".yml")


def _names_recipe(arg: str) -> bool:
    """Whether it can only be RECIPE: a file, or a packaged one such as paper/multiflow-blip."""
    return arg.endswith(_RECIPE) or ("/" in arg and "=" not in arg)


class ManyValues(click.Command):
    """Lets `--sparsity` and `--parameter` take several values: `--sparsity 0.63 0.75 0.9`."""

    many: tuple[str, ...] = ("--sparsity", "--parameter")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the option before each of its values; a recipe is never one of them."""
        spread: list[str] = []
        current = ""
        waiting = False  # for the first value, whatever it looks like
        for arg in args:
            option, sign, _ = arg.partition("=")
            is_option = arg.startswith("-") and not _NUMBER.match(arg)
            if option in self.many:
                current, waiting = option, not sign
                if sign:
                    spread.append(arg)
            elif is_option or not current or (_names_recipe(arg) and not waiting):
                current = ""
                spread.append(arg)
            else:
                spread.append(f"{current}={arg}")
                waiting = False
        if waiting:
            raise click.BadOptionUsage(current, f"Option {current!r} requires a value.", ctx)
        return super().parse_args(ctx, spread)


def grouped(*options: Option) -> Option:
    """One decorator of several options, which the help shows in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(min=0)

adapter_option = click.option(
    "--adapter", help="Name of the adapter, found by itself if left out; 'module' takes all."
)
device_option = click.option("--device", help="cpu, cuda, ...; a GPU if there is one.")
model_options = grouped(
    adapter_option, click.option("--dtype", default="float32", show_default=True), device_option
)
processor_option = click.option("--processor", help="Where the processor is, if not at the model.")
data_option = click.option("--data", help="Image folder with captions, tar shards, data set.")
split_option = click.option("--split", help="Of the data; the only one or train if left out.")
shuffle_option = click.option(
    "--shuffle-seed", type=SEED, help="Mixes the data; stored order if left out."
)
column_options = grouped(
    click.option("--image-column", help="Of the data; found if left out."),
    click.option("--caption-column", help="Of the data; found if left out."),
)
length_option = click.option("--max-length", type=COUNT, help="Most tokens of a caption.")
variant_option = click.option(
    "--variant", type=click.Choice(["default", "published"]), default="default", show_default=True,
    help="Follow the published code in all of this, or not.",
)  # fmt: skip
parameter_option = click.option(
    "--parameter", multiple=True, help="name=value, of the method; several."
)
resume_option = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
target_option = click.option("--out", "target", type=PATH, required=True)

recipe_options = grouped(
    click.argument("recipe", required=False, type=PATH),
    click.option("--model", help="Local folder, checkpoint file or hub id."),
    click.option("--method", help="Name of a method (see `vlp plugins`), or id*NAME."),
    click.option("--sparsity", multiple=True, help="0.75, or vision=0.5,text=0.8; several."),
    data_option,
    click.option("--out", help="New folder for masks and report."),
    click.option("--batches", type=COUNT, help="Calibration batches; all if left out."),
    click.option("--batch-size", type=COUNT, help="Pairs in a batch; 32 if left out."),
    parameter_option,
    click.option("--lambda", help="Ridge penalty of CHITA and CHITA++, or auto."),
    click.option("--allocation", help="global, modality, layer, row, id, keep=2,of=4."),
    click.option("--floor", type=float, help="Least fraction each layer keeps."),
    click.option(
        "--owners", type=click.Choice(["all", "first"]),
        help="Whose inputs count for a weight that several layers share.",
    ),
    click.option(
        "--variant", type=click.Choice(["default", "published"]),
        help="Reproduce the published code's counts and quirks, or not.",
    ),
    click.option("--statistics", help="Statistics of an earlier run instead of data."),
    click.option("--id-profile", help="Intrinsic dimensions of an earlier run."),
    click.option("--seed", type=SEED, help="For scores that draw random numbers."),
    split_option,
    shuffle_option,
    column_options,
    length_option,
    processor_option,
    adapter_option,
    click.option("--dtype", help="float32 (if left out), bfloat16 or float16."),
    device_option,
    click.option("--save-model", is_flag=True, default=None, help="Write pruned models too."),
    click.option("--checkpoint-every", type=COUNT, help="Batches between two; 50 if left out."),
    click.option("--memory-budget", help="Of gradients, or points of id*, as in 8GiB."),
    click.option(
        "--autocast", type=click.Choice(["bfloat16", "float16"]),
        help="Precision of the loss, whose gradients stay in float32.",
    ),
    click.option(
        "--skip-nonfinite", is_flag=True, default=None,
        help="Leave out batches whose loss or gradients are NaN or infinite.",
    ),
    click.option(
        "--keep-statistics", is_flag=True, default=None,
        help="Write statistics of more than 1 GB, too.",
    ),
)  # fmt: skip
"""The options of `jobs.recipes.OPTIONS`; each overrides the recipe's key."""


def read_recipe(recipe: Path | None, **options: Any) -> Recipe:
    """The recipe file, or an empty one, with the options of the command line on top.

    Raises:
        RecipeError: if the file or an option is wrong.
        SparsityError: if a sparsity is.
    """
    from vlp_plugins.jobs.recipe_values import amount_of, penalty_of
    from vlp_plugins.jobs.recipes import (
        Recipe,
        load_recipe,
        parameter_of,
        sparsity_of,
        with_options,
    )

    options["sparsity"] = tuple(map(sparsity_of, options["sparsity"])) or None
    options["parameter"] = dict(map(parameter_of, options["parameter"])) or None
    if options["lambda"] is not None:
        options["lambda"] = penalty_of(options["lambda"], "--lambda")
    if options["memory_budget"] is not None:
        options["memory_budget"] = amount_of(options["memory_budget"], "--memory-budget")
    return with_options(load_recipe(recipe) if recipe else Recipe(), **options)


def data_options(*, batches: str) -> Option:
    """MODEL, how it is loaded, and how data is read.

    Args:
        batches: help of `--batches`.
    """
    return grouped(
        click.argument("model"),
        data_option,
        click.option("--batches", type=COUNT, help=batches),
        click.option(
            "--batch-size", type=COUNT, default=32, show_default=True, help="Pairs in a batch."
        ),
        split_option,
        shuffle_option,
        column_options,
        length_option,
        processor_option,
        model_options,
    )


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
