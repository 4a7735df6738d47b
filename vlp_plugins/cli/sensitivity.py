"""`vlp sensitivity`: how much can be pruned where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.options import (
    PATH,
    SEED,
    ManyValues,
    data_options,
    data_recipe,
    model_source,
    parameter_option,
    resume_option,
    variant_option,
)
from vlp_plugins.cli.program import command_line, distributed_run
from vlp_plugins.cli.tables import print_facts, print_lines, print_table
from vlp_plugins.runtime.errors import RecipeError

DEFAULT = ("0.3", "0.5", "0.63", "0.75", "0.85", "0.9", "0.95")


class ManyParts(ManyValues):
    """Lets `--by` and `--modality` take several values, too."""

    many = (*ManyValues.many, "--by", "--modality")


@click.command(cls=ManyParts)
@data_options(batches="Batches that the method reads, if it reads data; all if left out.")
@click.option("--out", type=PATH, required=True, help="New folder.")
@click.option("--test", help="Data to measure on; pairs of --data that were not read if left out.")
@click.option(
    "--pairs", type=click.IntRange(min=2), default=512, show_default=True,
    help="How many pairs are measured on, in whole batches.",
)  # fmt: skip
@click.option("--method", default="omp", show_default=True, help="See `vlp plugins`.")
@parameter_option
@click.option("--allocation", help="Within a group: global, layer, row, keep=2,of=4.")
@click.option(
    "--sparsity", multiple=True, type=float, default=DEFAULT, show_default=True,
    help="Of the group that is pruned; several.",
)  # fmt: skip
@click.option(
    "--by", multiple=True, type=click.Choice(["modality", "block", "weight"]),
    default=("modality", "block"), show_default=True,
    help="What is pruned alone; several. A block is one modality at one depth.",
)  # fmt: skip
@click.option("--modality", multiple=True, help="Prune these only; several. All if left out.")
@click.option(
    "--id-profile",
    type=PATH,
    help="id-profile.json of `vlp id`: does the ID tell what can be pruned?",
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), default=0.05, show_default=True,
    help="Rise of the loss, as a fraction of the dense one, that is taken for harmless.",
)  # fmt: skip
@variant_option
@click.option("--seed", type=SEED, default=0, help="For random scores.")
@resume_option
@click.pass_context
def sensitivity(
    context: click.Context, out: Path, test: str | None, resume: bool, **values: Any
) -> None:
    """How much of MODEL can be pruned where: one modality, then one block of layers at a time.

    Each is pruned alone at rising sparsity, by the method within it; the pre-training loss and R@1
    are measured on pairs that the method does not read. The folder --out holds sensitivity.json,
    points.csv and report.html.
    """
    from vlp_plugins.jobs.inputs import Loaded
    from vlp_plugins.jobs.recipes import parameter_of
    from vlp_plugins.jobs.sensitivity import (
        SensitivityRequest,
        measure_sensitivity,
        relation_table,
        summary_table,
    )
    from vlp_plugins.jobs.work_dir import work_left
    from vlp_plugins.methods.resolve import resolve_method

    source, data = model_source(values), data_recipe(values)
    if data.source is None and test is None:
        raise RecipeError(
            "`vlp sensitivity` measures on data: give --data FOLDER or --test FOLDER (images with "
            "captions)"
        )
    request = SensitivityRequest(
        data,
        test,
        values.pop("pairs"),
        values.pop("id_profile"),
        values.pop("tolerance"),
        resolve_method(
            values["method"], values["allocation"], [], dict(map(parameter_of, values["parameter"]))
        ),
        {
            "sparsity": values["sparsity"],
            "groups": values["by"],
            "modalities": values["modality"] or None,
            "variant": values["variant"],
            "seed": values["seed"],
        },
    )
    line = command_line(context)
    with distributed_run(
        source.device, line, lambda: work_left(out), what="pruning and measuring", units="points"
    ) as (progress, rank_zero):
        result = measure_sensitivity(
            lambda: Loaded.of(source, max_length=data.max_length),
            request, out, command=line, resume=resume, progress=progress,
        )  # fmt: skip
    if not rank_zero:
        return
    analysis = result.analysis
    tables = [summary_table(analysis, level) for level in analysis.found.levels]
    if analysis.relations:
        tables.append(relation_table(analysis))
    for table in tables:
        print_table(table.title, table.header, table.rows)
    click.echo()
    print_lines(analysis.sentences)
    click.echo()
    print_facts(result.facts)
    click.echo(f"written: {result.out}")
