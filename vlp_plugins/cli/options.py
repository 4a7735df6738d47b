"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Option

if TYPE_CHECKING:
    from vlp_plugins.jobs.preparation import ModelSource
    from vlp_plugins.jobs.recipes import DataRecipe, Recipe


Decorator = Callable[[Any], Any]


def grouped(*options: Decorator) -> Decorator:
    """One decorator of several options."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(min=0)


def option(heading: str, *names: str, **settings: Any) -> Decorator:
    """An option under a heading; see `vlp_plugins.cli.help.Option`."""
    return click.option(*names, cls=Option, heading=heading, **settings)


_FOUND = "found by itself"

adapter_option = option(
    "Model", "--adapter", metavar="NAME", standard=_FOUND,
    help="The adapter, which says what the parts of the model are: blip, xvlm, clip, siglip, vit, "
    "or one of a plug-in (`vlp plugins`). 'module' takes any model, layer by layer.",
)  # fmt: skip
processor_option = option(
    "Model", "--processor", metavar="PATH_OR_ID", standard="the model's",
    help="Folder or hub id of the tokenizer and the image processor.",
)  # fmt: skip
# Where a recipe may set an option, it has no default of its own, and says so: `standard`.
_dtype_option = partial(
    option, "Computing", "--dtype", metavar="NAME",
    help="Number format of the weights, in memory and in models that are written: float32, "
    "bfloat16 or float16; auto keeps that of the checkpoint.",
)  # fmt: skip
device_option = option(
    "Computing", "--device", metavar="NAME", standard="a GPU if there is one",
    help="Where to compute: cpu, cuda, cuda:1.",
)  # fmt: skip
model_options = grouped(adapter_option, _dtype_option(default="auto"), device_option)
CALIBRATION = (
    "Images with captions, a few hundred or more: the calibration data, from which the method "
    "learns which weights matter. A folder with metadata.jsonl or metadata.csv, tar shards "
    "(WebDataset), or a data set that the library `datasets` reads."
)
calibration_option = option("Data", "--data", metavar="PATH_OR_ID", help=CALIBRATION)
split_option = option(
    "Data", "--split", metavar="NAME", standard="the only one, or train",
    help="Part of the data set, such as train, val or test.",
)  # fmt: skip
shuffle_option = option(
    "Data", "--shuffle-seed", type=SEED, metavar="SEED", standard="stored order",
    help="Shuffle the data, so that the first batches are a random sample of it; for instance 0.",
)  # fmt: skip
column_options = grouped(
    option(
        "Data", "--image-column", metavar="NAME", standard=_FOUND,
        help="Column of the data set that holds the images (in a folder: their file names), such "
        "as image.",
    ),
    option(
        "Data", "--caption-column", metavar="NAME", standard=_FOUND,
        help="Column of the data set that holds the captions, such as caption.",
    ),
)  # fmt: skip
limit_option = option(
    "Data", "--limit", type=COUNT, metavar="N", standard="all of the data",
    help="Number of images (or questions) to read, from the first one on.",
)  # fmt: skip
length_option = option(
    "Data", "--max-length", type=click.IntRange(min=3), metavar="TOKENS",
    standard="as the tokenizer says",
    help="Length at which texts are cut off, in tokens.",
)  # fmt: skip
chat_options = grouped(
    option(
        "Data", "--prompt", metavar="WORDS", standard="Describe the image.",
        help="Chat models: what the user says before a caption; {question} in it stands for a "
        "question of the data. For classes of CLIP and SigLIP: their text, with {} for the name.",
    ),
    option(
        "Data", "--max-pixels", type=COUNT, metavar="N", standard="401,408 on a CPU",
        help="Chat models that keep the size of images, such as Qwen-VL: most pixels of an image.",
    ),
)  # fmt: skip
workers_option = option(
    "Computing", "--workers", type=click.IntRange(min=0), metavar="N",
    standard="the cores but one, at most 8",
    help="Number of threads of a process that decode images while the model computes; results are "
    "the same for any number.",
)  # fmt: skip
batches_option = option(
    "Data", "--batches", type=COUNT, metavar="N", standard="all of the data",
    help="Number of batches to read.",
)  # fmt: skip
_batch_size_option = partial(
    option, "Data", "--batch-size", type=COUNT, metavar="N",
    help="Images, each with its caption, in a batch.",
)  # fmt: skip
_variant_option = partial(
    option, "Method", "--variant", type=click.Choice(["default", "published"]),
    help="'published' computes as the code of the authors does, with its known defects; "
    "'default' without them. docs/quirks.md lists the differences.",
)  # fmt: skip
variant_option = _variant_option(default="default")
parameter_option = option(
    "Method", "--parameter", several=True, metavar="NAME=VALUE...",
    help="Settings of the method, such as rounds=20. `vlp methods NAME` lists them.",
)  # fmt: skip
_seed_option = partial(
    option, "Method", "--seed", type=SEED, metavar="N",
    help="Seed of what is drawn at random, as by the method random.",
)  # fmt: skip
seed_option = _seed_option(default=0)
test_option = option(
    "Data", "--test", metavar="PATH_OR_ID",
    standard="pairs of --data that the method does not read",
    help="Images with captions to measure on.",
)  # fmt: skip
_PROFILE = "File id-profile.json of `vlp id`: the intrinsic dimension of each layer"
resume_option = option(
    "Computing", "--resume", is_flag=True, help="Continue this command where it was interrupted."
)
overwrite_option = option(
    "Output", "--overwrite", is_flag=True,
    help="Replace what --out names: a file, or a folder that this command wrote, with all that is "
    "in it.",
)  # fmt: skip
json_option = option(
    "Output", "--json", "as_json", is_flag=True,
    help="Print one JSON document in place of text; docs/json.md lists its fields.",
)  # fmt: skip
target_option = option(
    "Output", "--out", "target", type=PATH, metavar="PATH", required=True,
    help="Name of what is written, a file or folder that does not exist yet.",
)  # fmt: skip
written_options = grouped(target_option, overwrite_option)
run_options = grouped(overwrite_option, resume_option)
reading_options = grouped(
    column_options, length_option, chat_options, processor_option, model_options, workers_option
)
"""How a model is loaded, and how data is read for it."""

recipe_options = grouped(
    click.argument("recipe", required=False, type=PATH),
    option(
        "Model", "--model", metavar="PATH_OR_ID",
        help="Model to prune: its folder, a checkpoint file, or an id of the Hugging Face hub.",
    ),
    option(
        "Method", "--method", metavar="NAME", standard="multiflow",
        help="Pruning method, such as omp or wanda; `vlp methods` lists all. With id*NAME, layers "
        "of higher intrinsic dimension keep more.",
    ),
    option(
        "Method", "--sparsity", several=True, metavar="FRACTION...",
        help="Fraction of the weights to remove, such as 0.75. Several make several sets of masks. "
        "Modalities, the vision, text and fusion part of a model, may have one each: "
        "vision=0.5,text=0.8. keep=2,of=4 keeps 2 of each 4 inputs.",
    ),
    calibration_option,
    option("Output", "--out", metavar="FOLDER", help="New folder for masks and report."),
    batches_option,
    _batch_size_option(standard="32"),
    parameter_option,
    option(
        "Method", "--lambda", metavar="NUMBER", standard="auto",
        help="Of chita and chita++: ridge penalty, such as 1e-3; 'auto' tries several on "
        "batches that are kept apart.",
    ),
    option(
        "Method", "--allocation", metavar="NAME", standard="the method's own",
        help="What the sparsity holds for: the model as a whole (global), each modality, layer or "
        "row (output neuron), modalities by intrinsic dimension (id), or 2 of each 4 inputs "
        "(keep=2,of=4).",
    ),
    option(
        "Method", "--floor", type=float, metavar="FRACTION", standard="0",
        help="Fraction of its weights that every layer keeps at least, such as 0.05.",
    ),
    option(
        "Method", "--owners", type=click.Choice(["all", "first"]),
        standard="first if published, else all",
        help="The owners of a weight are the layers that share it, as in BLIP's text encoder and "
        "decoder: judge it by the inputs of 'all' or of the 'first'.",
    ),
    _variant_option(standard="default"),
    option(
        "Method", "--walk", type=click.Choice(["model", "blocks"]), standard="the method's own",
        help="'blocks' prunes one layer of the model after the other, each by what the pruned ones "
        "before it give out; 'model' looks at the whole dense model.",
    ),
    option(
        "Method", "--tokens", metavar="NAME", standard="the method's own, or all",
        help="Which tokens count, layer by layer: text, image, atv, amia or a plug-in's "
        "(`vlp methods`); implies --walk blocks.",
    ),
    option(
        "Data", "--statistics", metavar="FILE",
        help="File statistics.safetensors of an earlier run, to be used in place of data: other "
        "sparsities within seconds.",
    ),
    option(
        "Method", "--id-profile", metavar="FILE", standard="measured from the data",
        help=f"{_PROFILE}, for id*NAME and --allocation id.",
    ),
    _seed_option(standard="0"),
    split_option,
    shuffle_option,
    column_options,
    length_option,
    chat_options,
    processor_option,
    adapter_option,
    _dtype_option(standard="auto"),
    device_option,
    workers_option,
    option(
        "Output", "--save-model", is_flag=True, default=None,
        help="Write the pruned models too, each to a folder model-SPARSITY.",
    ),
    option(
        "Computing", "--checkpoint-every", type=COUNT, metavar="N", standard="50",
        help="Number of batches between two checkpoints, from which --resume continues.",
    ),
    option(
        "Computing", "--memory-budget", metavar="SIZE", standard="what is free",
        help="Most memory to use for gradients (chita) or layer outputs (id*), such as 8GiB.",
    ),
    option(
        "Computing", "--autocast", type=click.Choice(["bfloat16", "float16"]),
        standard="as --dtype",
        help="Number format in which methods with gradients compute the loss. The gradients "
        "themselves stay in float32.",
    ),
    option(
        "Computing", "--skip-nonfinite", is_flag=True, default=None,
        help="Leave out batches whose loss or gradients are infinite or NaN, rather than stop.",
    ),
    option(
        "Output", "--keep-statistics", is_flag=True, default=None,
        help="Write the statistics of the data even if they take more than 1 GB.",
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
        sparsity_or_pattern,
        with_options,
    )

    options |= sparsity_or_pattern(options["sparsity"], options["allocation"])
    options["parameter"] = dict(map(parameter_of, options["parameter"])) or None
    if options["lambda"] is not None:
        options["lambda"] = penalty_of(options["lambda"], "--lambda")
    if options["memory_budget"] is not None:
        options["memory_budget"] = amount_of(options["memory_budget"], "--memory-budget")
    return with_options(load_recipe(recipe) if recipe else Recipe(), **options)


calibration_options = grouped(
    click.argument("model"),
    calibration_option,
    batches_option,
    _batch_size_option(default=32),
    split_option,
    shuffle_option,
    reading_options,
)
"""MODEL, how it is loaded, and how calibration data is read."""


def model_source(values: dict[str, Any]) -> ModelSource:
    """Takes what says how the model is loaded out of the values of the options."""
    from vlp_plugins.jobs.preparation import ModelSource

    names = ("model", "adapter", "processor", "dtype", "device")
    return ModelSource(**{name: values.pop(name) for name in names})


def data_recipe(values: dict[str, Any]) -> DataRecipe:
    """Takes what says how data is read out of the values of the options."""
    from vlp_plugins.jobs.recipes import DataRecipe

    names = ("split", "batch_size", "batches", "image_column", "caption_column", "max_length",
             "prompt", "max_pixels", "workers")  # fmt: skip
    found = {name: values.pop(name) for name in names}
    return DataRecipe(values.pop("data"), seed=values.pop("shuffle_seed", None), **found)
