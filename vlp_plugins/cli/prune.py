"""`vlp prune`: the main job."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.options import ManyValues, read_recipe, recipe_options, resume_option
from vlp_plugins.cli.program import distributed_run, steps_shown
from vlp_plugins.cli.tables import print_facts, print_lines, print_masks


@click.command(cls=ManyValues)
@recipe_options
@resume_option
def prune(resume: bool, **options: Any) -> None:
    """Prunes as RECIPE and options say: masks, layers.csv and report.html in --out.

    RECIPE is a YAML file, or the name of a recipe of this package, such as paper/multiflow-blip (a
    name that does not exist lists them all). An option wins over the recipe's key.
    Under torchrun the processes share the data pass:
    torchrun --nproc-per-node 2 -m vlp_plugins prune ...
    """
    from vlp_plugins.jobs.prune import leftovers, run
    from vlp_plugins.jobs.recipes import command_of

    recipe = read_recipe(**options)
    line = command_of(recipe)
    with (
        distributed_run(
            recipe.device, line, lambda: recipe.out and leftovers(Path(recipe.out))
        ) as (progress, rank_zero),
        steps_shown() if rank_zero else nullcontext(),
    ):
        result = run(recipe, progress=progress, resume=resume)
    if not rank_zero:
        return
    print_masks(result.masks)
    print_lines((f"warning: {warning}" for warning in result.warnings), err=True)
    click.echo()
    print_facts(result.facts)
    click.echo(f"written: {result.out}")
