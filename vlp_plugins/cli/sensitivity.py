"""`vlp sensitivity`: how much can be pruned where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    PATH,
    calibration_options,
    data_recipe,
    model_source,
    option,
    parameter_option,
    run_options,
    seed_option,
    test_option,
    variant_option,
)
from vlp_plugins.cli.program import command_line, distributed_run
from vlp_plugins.cli.terminal import print_facts, print_lines, print_table
from vlp_plugins.runtime.errors import RecipeError

DEFAULT = ("0.3", "0.5", "0.63", "0.75", "0.85", "0.9", "0.95")


@click.command(
    cls=Command,
    short_help="Find out which parts of a model can be pruned.",
    examples=[
        "vlp sensitivity model --data photos --out curves",
        "vlp sensitivity model --data photos --by modality --sparsity 0.5 0.9 \\\n"
        "    --batch-size 8 --pairs 16 --out quick",
    ],
)
@calibration_options
@option(
    "Output", "--out", type=PATH, metavar="FOLDER", required=True,
    help="New folder for the curves (sensitivity.json, points.csv) and the report.",
)  # fmt: skip
@test_option
@option(
    "Data", "--pairs", type=click.IntRange(min=2), metavar="N", default=512,
    help="Number of images with captions to measure on, in whole batches.",
)  # fmt: skip
@option(
    "Method", "--method", metavar="NAME", default="omp",
    help="Method that prunes; `vlp methods` lists all.",
)  # fmt: skip
@parameter_option
@option(
    "Method", "--allocation", metavar="NAME", standard="the method's own",
    help="How the sparsity of a part is divided within it: global, layer, row, keep=2,of=4.",
)  # fmt: skip
@option(
    "Method", "--sparsity", several=True, type=float, metavar="FRACTION...", default=DEFAULT,
    help="Fractions of a part to remove.",
)  # fmt: skip
@option(
    "Measuring", "--by", "groups", several=True, type=click.Choice(["modality", "block", "weight"]),
    default=("modality", "block"),
    help="The parts, each of which is pruned alone: modalities (vision, text, fusion), blocks (one "
    "depth of a modality), single weights. Several may follow.",
)  # fmt: skip
@option(
    "Measuring", "--modality", "modalities", several=True, metavar="NAME...", standard="all",
    help="Prune these modalities only, such as vision.",
)  # fmt: skip
@option(
    "Measuring", "--id-profile", type=PATH, metavar="FILE",
    help="File id-profile.json of `vlp id`: is a part of low dimension easier to prune?",
)  # fmt: skip
@option(
    "Measuring", "--tolerance", type=click.FloatRange(min=0, min_open=True), metavar="FRACTION",
    default=0.05,
    help="Rise of the loss that counts as harmless, as a fraction of the loss before.",
)  # fmt: skip
@variant_option
@seed_option
@run_options
@click.pass_context
def sensitivity(
    context: click.Context,
    out: Path,
    test: str | None,
    resume: bool,
    overwrite: bool,
    **values: Any,
) -> None:
    """Find out which parts of MODEL can be pruned, and how far.

    One modality, then one block of layers at a time is pruned at rising sparsity, while the rest
    stays dense. The pre-training loss and R@1 of retrieval are measured on images that the method
    does not read. The folder --out holds sensitivity.json,
    points.csv and report.html.
    """
    from vlp_plugins.jobs.preparation import Loaded
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
    own = {name: values.pop(name) for name in ("pairs", "id_profile", "tolerance")}
    parameters = dict(map(parameter_of, values.pop("parameter")))
    method = resolve_method(values.pop("method"), values.pop("allocation"), [], parameters)
    values["modalities"] = values["modalities"] or None
    request = SensitivityRequest(data, test, method=method, **own, options=values)
    line = command_line(context)
    with distributed_run(
        source.device, line, lambda: work_left(out), what="pruning and measuring", units="points"
    ) as (progress, rank_zero):
        result = measure_sensitivity(
            lambda: Loaded.of(source, **data.of_processor),
            request, out, command=line, resume=resume, overwrite=overwrite, progress=progress,
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
