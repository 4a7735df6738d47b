"""`vlp id`: the intrinsic dimension of what every layer outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    data_options,
    data_recipe,
    model_source,
    resume_option,
    variant_option,
)
from vlp_plugins.cli.program import command_line, distributed_run
from vlp_plugins.cli.tables import duration, print_facts, print_lines, print_table
from vlp_plugins.runtime.errors import RecipeError

if TYPE_CHECKING:
    from vlp_plugins.jobs.inputs import ModelSource
    from vlp_plugins.jobs.recipes import DataRecipe


@click.command("id")
@data_options(batches="Batches to read; all if left out.")
@click.option("--out", type=PATH, help="New folder for profile and report.")
@click.option("--memory-budget", help="What points may take next to the model, as in 8GiB.")
@click.option("--points-dtype", help="That points are kept in: float32, bfloat16 or float16.")
@click.option(
    "--fit", type=click.Choice(["slope", "likelihood"]), default="slope", show_default=True,
    help="Line through the origin, or maximum likelihood.",
)  # fmt: skip
@click.option(
    "--drop",
    type=click.FloatRange(0, 0.9),
    help="Fraction of the largest ratios left out; two points if not given.",
)
@click.option("--blocks", type=COUNT, help="Mean over 1 to so many blocks.")
@click.option(
    "--padding",
    type=click.Choice(["real", "published"]),
    help="Points of real tokens, or with what layers give out for padding.",
)
@variant_option
@resume_option
@click.option("--plan", "planned", is_flag=True, help="Say bytes, passes and time, and stop.")
@click.pass_context
def id_(
    context: click.Context, out: Path | None, resume: bool, planned: bool, **values: Any
) -> None:
    """The intrinsic dimension (TwoNN) of what every prunable layer of MODEL outputs.

    Points are samples, some hundred or more; layers are taken in as many passes over the data as
    the memory budget asks for. The folder --out holds id-profile.json (for --id-profile),
    layers.csv and report.html. Under torchrun the processes share the work:
    torchrun --nproc-per-node 2 -m vlp_plugins id ...
    """
    from vlp_plugins.jobs.dimensions import measure_dimensions
    from vlp_plugins.jobs.inputs import Loaded
    from vlp_plugins.jobs.work_dir import work_left

    source, data = model_source(values), data_recipe(values)
    options = _options_of(values)
    if planned:
        _print_plan(source, data, options)
        return
    if data.source is None:
        raise RecipeError("`vlp id` measures on data: give --data FOLDER (images with captions)")
    line = command_line(context)
    with distributed_run(source.device, line, lambda: out and work_left(out)) as (
        progress,
        rank_zero,
    ):
        result = measure_dimensions(
            lambda: Loaded.of(source, max_length=data.max_length),
            data, options, out, command=line, resume=resume, progress=progress,
        )  # fmt: skip
    if not rank_zero:
        return
    from vlp_plugins.jobs.dimensions import LAYER_HEADER, MODALITY_HEADER, summary_of
    from vlp_plugins.report.dimensions import layer_rows, modality_rows

    layers = result.profile.layers
    print_table("By modality", MODALITY_HEADER, modality_rows(layers))
    print_table("Layers", LAYER_HEADER, layer_rows(layers))
    click.echo()
    print_lines(summary_of(result.profile))
    click.echo()
    print_facts(result.facts)
    if result.out is not None:
        click.echo(f"written: {result.out}")


def _options_of(values: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `measure_id`; an estimator that is not asked for is left to the variant."""
    from vlp_plugins.dimension.measure import default_settings

    variant = values["variant"]
    usual, _ = default_settings(published=variant == "published")
    blocks = values["blocks"] or usual.blocks
    return {
        "estimator": replace(usual, fit=values["fit"], drop=values["drop"], blocks=blocks),
        "padding": values["padding"],
        "dtype": values["points_dtype"],
        "memory_budget": values["memory_budget"],
        "variant": variant,
    }


def _print_plan(source: ModelSource, data: DataRecipe, options: dict[str, Any]) -> None:
    from vlp_plugins.jobs.plan import plan_dimensions

    planned = plan_dimensions(source, data, options)
    for sentence in planned.plan.lines:
        click.echo(sentence)
    click.echo(f"forward passes: about {duration(planned.forward_seconds)}, without the images")
    click.echo(f"search for neighbours: about {duration(planned.neighbour_seconds)}")
