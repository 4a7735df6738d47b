"""`vlp id`: the intrinsic dimension of what every layer outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    calibration_options,
    data_recipe,
    model_source,
    option,
    run_options,
    variant_option,
)
from vlp_plugins.cli.program import command_line, distributed_run
from vlp_plugins.cli.terminal import print_facts, print_lines, print_table, say
from vlp_plugins.runtime.errors import RecipeError

if TYPE_CHECKING:
    from vlp_plugins.jobs.preparation import ModelSource
    from vlp_plugins.jobs.recipes import DataRecipe


@click.command(
    "id",
    cls=Command,
    short_help="Measure the intrinsic dimension of every layer.",
    examples=[
        "vlp id model --data photos --out dimensions",
        "vlp id model --data photos --memory-budget 8GiB --plan",
    ],
)
@calibration_options
@option(
    "Output", "--out", type=PATH, metavar="FOLDER",
    help="New folder for the profile (id-profile.json) and the report.",
)  # fmt: skip
@option(
    "Computing", "--memory-budget", metavar="SIZE", standard="what is free",
    help="Most memory to use for layer outputs, such as 8GiB. Less memory means more passes over "
    "the data, with the same result.",
)  # fmt: skip
@option(
    "Computing", "--points-dtype", metavar="NAME", standard="as the layer gives them",
    help="Number format in which layer outputs are kept: float32, bfloat16 or float16.",
)  # fmt: skip
@option(
    "Measuring", "--fit", type=click.Choice(["slope", "likelihood"]), default="slope",
    help="How TwoNN turns distances into a dimension: slope of a line through the origin, or "
    "maximum likelihood.",
)  # fmt: skip
@option(
    "Measuring", "--drop", type=click.FloatRange(0, 0.9), metavar="FRACTION",
    standard="two points of a slope, none of a likelihood",
    help="Fraction of the largest distance ratios to leave out of the fit, such as 0.1.",
)  # fmt: skip
@option(
    "Measuring", "--blocks", type=COUNT, metavar="N", standard="1; published: 20",
    help="Average over estimates from 1 to N disjoint parts of the data.",
)  # fmt: skip
@option(
    "Measuring", "--padding", type=click.Choice(["real", "published"]),
    standard="as the variant",
    help="Measure outputs of real tokens only, or also what layers give out for padding, as "
    "published.",
)  # fmt: skip
@variant_option
@run_options
@option(
    "Output", "--plan", "planned", is_flag=True,
    help="Only say how much memory, how many passes and how much time it would take.",
)  # fmt: skip
@click.pass_context
def id_(
    context: click.Context,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    planned: bool,
    **values: Any,
) -> None:
    """Measure the intrinsic dimension (TwoNN) of the outputs of every prunable layer of MODEL.

    It is the number of dimensions on which the outputs for some hundred samples lie, and says how
    rich a layer is. The folder --out holds id-profile.json (for --id-profile),
    layers.csv and report.html. Under torchrun the processes share the work:
    torchrun --nproc-per-node 2 -m vlp_plugins id ...
    """
    from vlp_plugins.jobs.dimensions import measure_dimensions
    from vlp_plugins.jobs.preparation import Loaded
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
            lambda: Loaded.of(source, **data.of_processor),
            data, options, out, command=line, resume=resume, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    if not rank_zero:
        return
    from vlp_plugins.jobs.dimensions import summary_of
    from vlp_plugins.report.dimensions import layer_table, modality_table

    layers = result.profile.layers
    for table in (modality_table(layers), layer_table(layers)):
        print_table(table.title, table.header, table.rows)
    say()
    print_lines(summary_of(result.profile))
    say()
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
    from vlp_plugins.runtime.numbers import duration

    planned = plan_dimensions(source, data, options)
    for sentence in planned.plan.lines:
        say(sentence)
    say(f"forward passes: about {duration(planned.forward_seconds)}, without the images")
    say(f"search for neighbours: about {duration(planned.neighbour_seconds)}")
