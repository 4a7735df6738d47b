"""`vlp finetune`: a pruned model learns a task, and stays pruned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    SEED,
    adapter_option,
    column_options,
    device_option,
    grouped,
    length_option,
    limit_option,
    option,
    processor_option,
    run_options,
    split_option,
    workers_option,
)
from vlp_plugins.cli.program import command_line, explained_interruption
from vlp_plugins.cli.terminal import data_progress, print_facts
from vlp_plugins.tasks import TASKS

if TYPE_CHECKING:
    from vlp_plugins.jobs.finetune import FinetuneRecipe
    from vlp_plugins.tasks.finetuning.engine import Engine

_recipe_options = grouped(
    option(
        "Task", "--task", type=click.Choice(TASKS),
        help="What the model learns. Needed here or in the recipe.",
    ),
    option(
        "Data", "--data", metavar="PATH_OR_ID",
        help="Data to train on, of the kinds that `vlp evaluate` reads.",
    ),
    split_option,
    limit_option,
    option(
        "Training", "--batch-size", type=COUNT, metavar="N", standard="32",
        help="Samples of one step of the optimizer, all processes together.",
    ),
    option(
        "Training", "--epochs", type=COUNT, metavar="N", standard="1",
        help="How often the data is read.",
    ),
    option(
        "Training", "--steps", type=COUNT, metavar="N", standard="as the epochs have",
        help="Number of steps of the optimizer, in place of epochs.",
    ),
    option(
        "Training", "--learning-rate", type=float, metavar="NUMBER", standard="1e-5",
        help="The highest learning rate (AdamW).",
    ),
    option(
        "Training", "--weight-decay", type=float, metavar="NUMBER", standard="0.05",
        help="Weight decay of matrices; biases and norms have none.",
    ),
    option(
        "Training", "--schedule", type=click.Choice(["cosine", "linear", "constant"]),
        standard="cosine", help="How the learning rate falls to zero.",
    ),
    option(
        "Training", "--warmup", type=float, metavar="FRACTION", standard="0",
        help="Fraction of the steps in which the learning rate rises, such as 0.1.",
    ),
    option(
        "Training", "--betas", type=float, nargs=2, metavar="NUMBER NUMBER", standard="0.9 0.999",
        help="The two betas of AdamW.",
    ),
    option(
        "Training", "--accumulate", type=COUNT, metavar="N", standard="1",
        help="Number of parts in which the batch of a step is computed: more take less memory.",
    ),
    option(
        "Training", "--clip", type=float, metavar="NUMBER", standard="not clipped",
        help="Largest norm of the gradient of a step, such as 1.",
    ),
    option(
        "Computing", "--autocast", type=click.Choice(["bfloat16", "float16"]),
        standard="float32", help="Number format in which the loss is computed.",
    ),
    option(
        "Training", "--seed", type=SEED, metavar="N", standard="0",
        help="Seed of the order of the data, of dropout and of new layers.",
    ),
    column_options,
    length_option,
    option(
        "Computing", "--checkpoint-every", type=COUNT, metavar="N", standard="500",
        help="Number of steps between two checkpoints, from which --resume continues.",
    ),
    workers_option,
    option(
        "Output", "--log-every", type=COUNT, metavar="N", standard="10",
        help="Number of steps that a line of losses.jsonl is the mean of.",
    ),
)  # fmt: skip
"""The keys of `FinetuneRecipe`; each overrides the recipe's."""


@click.command(
    cls=Command,
    short_help="Train a pruned model on a task; zeros stay zero.",
    examples=[
        "vlp finetune model --task retrieval --masks masks.safetensors --data photos \\\n"
        "    --epochs 6 --out tuned",
        "vlp finetune model --recipe finetune.yaml --data photos --steps 10 --out short",
    ],
)
@click.argument("model")
@option(
    "Training", "--recipe", type=PATH, metavar="FILE",
    help="YAML file with settings of training, or the name of a packaged one, such as "
    "paper/finetune-blip-vqa; options win over it.",
)  # fmt: skip
@option(
    "Model", "--masks", type=PATH, metavar="FILE", standard="every weight is trained",
    help="Masks to apply first; what they remove stays zero.",
)  # fmt: skip
@option(
    "Output", "--out", type=PATH, metavar="FOLDER", required=True,
    help="New folder for the trained model and its log.",
)  # fmt: skip
@_recipe_options
@processor_option
@device_option
@adapter_option
@run_options
@click.pass_context
def finetune(
    context: click.Context,
    model: str,
    recipe: Path | None,
    masks: Path | None,
    out: Path,
    processor: str | None,
    device: str | None,
    resume: bool,
    overwrite: bool,
    **values: Any,
) -> None:
    """Train MODEL on a task, and keep what --masks removes at zero.

    MODEL is a pre-trained model or one of the task. The folder --out holds the model, its masks,
    losses.jsonl and finetuning.json. On several GPUs: accelerate launch -m vlp_plugins finetune ...
    """
    from vlp_plugins.jobs.finetune import (
        FinetuneRecipe,
        load_finetune_recipe,
        run_finetuning,
        with_finetune_options,
    )
    from vlp_plugins.jobs.preparation import Loaded, ModelSource
    from vlp_plugins.jobs.work_dir import work_left

    written = FinetuneRecipe() if recipe is None else load_finetune_recipe(recipe)
    wanted = with_finetune_options(written, **values)
    line = command_line(context)
    with _engine(wanted, device) as engine:
        rank_zero = engine is None or engine.index == 0
        place = device if engine is None else str(engine.device)
        # Small steps are lost in the number formats of fewer digits.
        source = ModelSource(model, wanted.adapter, processor, "float32", place)
        with (
            explained_interruption(line, lambda: work_left(out), shown=rank_zero),
            data_progress(shown=rank_zero, what="fine-tuning", units="steps") as progress,
        ):
            result = run_finetuning(
                lambda: Loaded.of(source, max_length=wanted.max_length),
                wanted, out, masks=masks, engine=engine, command=line, resume=resume,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
    if not rank_zero:
        return
    if result.done.resumed_from:
        click.echo(f"resumed from step {result.done.resumed_from:,}")
    print_facts(result.facts)
    first, last = result.done.log[0], result.done.log[-1]
    click.echo(f"loss: {first['loss']:.4g} (step {first['step']}) to {last['loss']:.4g}")
    click.echo(f"written: {result.out}")


@contextmanager
def _engine(recipe: FinetuneRecipe, device: str | None) -> Iterator[Engine | None]:
    """Of several processes that were launched; None in a process alone."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield None
        return
    from vlp_plugins.hosts.accelerate import launched

    with launched(recipe.settings.autocast, cpu=device == "cpu") as engine:
        yield engine
