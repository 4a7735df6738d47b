"""`vlp finetune`: a pruned model learns a task, and stays pruned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    SEED,
    adapter_option,
    column_options,
    device_option,
    grouped,
    processor_option,
    resume_option,
    split_option,
)
from vlp_plugins.cli.program import command_line, data_progress, explained_interruption
from vlp_plugins.cli.tables import print_facts
from vlp_plugins.tasks import TASKS

if TYPE_CHECKING:
    from vlp_plugins.jobs.finetune_recipe import FinetuneRecipe
    from vlp_plugins.tasks.finetuning.engine import Engine

_recipe_options = grouped(
    click.option("--task", type=click.Choice(TASKS)),
    click.option("--data", help="Folder of a data set (as of `vlp evaluate`), file or id."),
    split_option,
    click.option("--limit", type=COUNT, help="First images (questions) only."),
    click.option(
        "--batch-size", type=COUNT, help="Rows of a step, of all processes; 32 if left out."
    ),
    click.option("--epochs", type=COUNT, help="1 if left out."),
    click.option("--steps", type=COUNT, help="Of the optimizer, instead of epochs."),
    click.option("--learning-rate", type=float, help="The highest; 1e-5 if left out."),
    click.option("--weight-decay", type=float, help="Of matrices; 0.05 if left out."),
    click.option(
        "--schedule", type=click.Choice(["cosine", "linear", "constant"]),
        help="Of the learning rate; cosine if left out.",
    ),
    click.option("--warmup", type=float, help="Fraction of the steps; 0 if left out."),
    click.option("--betas", type=float, nargs=2, help="Of AdamW; 0.9 0.999 if left out."),
    click.option("--accumulate", type=COUNT, help="Parts that a step is computed in."),
    click.option("--clip", type=float, help="Largest norm of a gradient."),
    click.option("--autocast", type=click.Choice(["bfloat16", "float16"])),
    click.option("--seed", type=SEED, help="Of mixture, dropout, new heads."),
    column_options,
    click.option("--max-length", type=click.IntRange(min=3), help="Most tokens of a text."),
    click.option("--checkpoint-every", type=COUNT, help="Steps between; 500 if left out."),
    click.option(
        "--workers", type=click.IntRange(min=0),
        help="Threads that decode images ahead; 1 if left out.",
    ),
    click.option("--log-every", type=COUNT, help="Steps of a line; 10 if left out."),
)  # fmt: skip
"""The keys of `FinetuneRecipe`; each overrides the recipe's."""


@click.command()
@click.argument("model")
@click.option(
    "--recipe", type=PATH,
    help="YAML file, or a name such as paper/finetune-blip-vqa; options win over it.",
)  # fmt: skip
@click.option("--masks", type=PATH, help="Mask file; all train without.")
@click.option("--out", type=PATH, required=True, help="New folder.")
@_recipe_options
@processor_option
@device_option
@adapter_option
@resume_option
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
    **values: Any,
) -> None:
    """Fine-tunes MODEL on a task with what --masks removes kept at zero.

    MODEL is of pre-training, or of the task already. The folder --out holds the model, its masks,
    losses.jsonl and finetuning.json. On several GPUs: accelerate launch -m vlp_plugins finetune ...
    """
    from vlp_plugins.jobs.finetune import run_finetuning
    from vlp_plugins.jobs.inputs import Loaded, ModelSource
    from vlp_plugins.jobs.work_dir import work_left

    wanted = _recipe(recipe, values)
    line = command_line(context)
    with _engine(wanted, device) as engine:
        rank_zero = engine is None or engine.index == 0
        place = device if engine is None else str(engine.device)
        source = ModelSource(model, wanted.adapter, processor, device=place)
        with (
            explained_interruption(line, lambda: work_left(out), shown=rank_zero),
            data_progress(shown=rank_zero, what="fine-tuning", units="steps") as progress,
        ):
            result = run_finetuning(
                lambda: Loaded.of(source, max_length=wanted.max_length),
                wanted, out, masks=masks, engine=engine, command=line, resume=resume,
                progress=progress,
            )  # fmt: skip
    if not rank_zero:
        return
    if result.done.resumed_from:
        click.echo(f"resumed from step {result.done.resumed_from:,}")
    print_facts(result.facts)
    first, last = result.done.log[0], result.done.log[-1]
    click.echo(f"loss: {first['loss']:.4g} (step {first['step']}) to {last['loss']:.4g}")
    click.echo(f"written: {result.out}")


def _recipe(path: Path | None, values: dict[str, Any]) -> FinetuneRecipe:
    from vlp_plugins.jobs.finetune_recipe import (
        FinetuneRecipe,
        load_finetune_recipe,
        with_finetune_options,
    )

    written = FinetuneRecipe() if path is None else load_finetune_recipe(path)
    return with_finetune_options(written, **values)


@contextmanager
def _engine(recipe: FinetuneRecipe, device: str | None) -> Iterator[Engine | None]:
    """Of several processes that were launched; None in a process alone."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield None
        return
    from vlp_plugins.hosts.accelerate import launched

    with launched(recipe.settings.autocast, cpu=device == "cpu") as engine:
        yield engine
