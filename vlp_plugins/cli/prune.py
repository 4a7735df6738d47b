"""`vlp prune`: the main job."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    option,
    read_recipe,
    recipe_options,
    run_options,
)
from vlp_plugins.cli.program import distributed_run
from vlp_plugins.cli.terminal import print_facts, print_lines, print_masks, print_table, steps_shown


def _list_recipes(context: click.Context, _option: click.Parameter, given: bool) -> None:
    if not given or context.resilient_parsing:
        return
    from vlp_plugins.jobs.recipes import packaged_recipes

    found = packaged_recipes()
    about = {
        name: re.split(r", as in|[;:]|\.$", path.read_text(encoding="utf-8").partition("\n")[0])[0]
        for name, path in found.items()
    }
    rows = [[name, text.removeprefix("# ")] for name, text in about.items()]
    print_table("", ["recipe", "what it is"], rows)
    click.echo(f"files: {next(iter(found.values())).parents[1]}")
    context.exit()


@click.command(
    cls=Command,
    short_help="Prune a model: make masks and a report.",
    examples=[
        "vlp prune --model model --data photos --sparsity 0.63 0.75 0.9 --out pruned",
        "vlp prune --model model --method omp --sparsity 0.5 --save-model --out halved",
        "vlp prune recipe.yaml --sparsity 0.8 --out pruned-80",
    ],
)
@recipe_options
@run_options
@option(
    "Output", "--recipes", is_flag=True, is_eager=True, expose_value=False,
    callback=_list_recipes,
    help="Print the recipes of this package and where their files are, and stop.",
)  # fmt: skip
def prune(resume: bool, overwrite: bool, **options: Any) -> None:
    """Prune a model: decide which weights to remove, and write masks and a report to --out.

    Masks say which weights stay; `vlp masks apply` makes a pruned model of them. RECIPE is a YAML
    file with the same settings (`vlp init` writes one), or the name of a recipe of this package,
    such as paper/multiflow-blip (--recipes lists them); options win over it.
    Several processes share the work under torchrun:
    torchrun --nproc-per-node 2 -m vlp_plugins prune ...
    """
    from vlp_plugins.jobs.prune import leftovers, run
    from vlp_plugins.jobs.recipes import command_of

    recipe = read_recipe(**options)
    line = command_of(recipe) + (" --overwrite" if overwrite else "")
    with (
        distributed_run(
            recipe.device, line, lambda: recipe.out and leftovers(Path(recipe.out))
        ) as (progress, rank_zero),
        steps_shown() if rank_zero else nullcontext(),
    ):
        result = run(recipe, progress=progress, resume=resume, overwrite=overwrite)
    if not rank_zero:
        return
    print_masks(result.masks)
    print_lines((f"warning: {warning}" for warning in result.warnings), err=True)
    click.echo()
    print_facts(result.facts)
    click.echo(f"written: {result.out}")
