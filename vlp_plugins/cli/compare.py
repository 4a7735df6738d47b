"""`vlp compare`: which method is best for this model and this data?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    SEED,
    data_recipe,
    json_option,
    model_source,
    option,
    reading_options,
    run_options,
    split_option,
)
from vlp_plugins.cli.program import command_line, explained_interruption
from vlp_plugins.cli.terminal import (
    columns,
    data_progress,
    print_facts,
    print_json,
    print_lines,
    print_table,
    say,
    steps_shown,
    verbosity,
    visible,
)
from vlp_plugins.jobs import COMPARED
from vlp_plugins.tasks import MEASURED

if TYPE_CHECKING:
    from vlp_plugins.jobs.compare import ComparisonPlan


@click.command(
    cls=Command,
    short_help="Find the best method for a model and its data.",
    examples=[
        "vlp compare model --data photos --out compared",
        "vlp compare model --data photos --methods multiflow wanda chita \\\n"
        "    --sparsity 0.5 0.75 0.9 --seeds 3 --out repeated",
    ],
)
@click.argument("model")
@option(
    "Data", "--data", metavar="PATH_OR_ID",
    help="Images with captions, questions or classes: a part is shown to the methods (calibration "
    "data), another one is measured on. See `vlp evaluate --help` which kinds.",
)  # fmt: skip
@option(
    "Data", "--test", metavar="PATH_OR_ID", standard="a part of --data",
    help="Other data to measure on.",
)  # fmt: skip
@split_option
@option(
    "Data", "--test-split", metavar="NAME", standard="the only one, or train",
    help="Part of --test (or else of --data) to measure on, such as test.",
)  # fmt: skip
@option(
    "Data", "--limit", type=COUNT, metavar="N", default=1000,
    help="Most images (or questions) to measure on, drawn at random; of --data never more than "
    "half.",
)  # fmt: skip
@option(
    "Data", "--batches", type=COUNT, metavar="N", default=16,
    help="Number of batches that are shown to the methods.",
)  # fmt: skip
@option("Data", "--batch-size", type=COUNT, metavar="N", default=32, help="Samples in a batch.")
@option(
    "Data", "--seed", type=SEED, metavar="N", default=0,
    help="Seed by which samples to measure on, samples for calibration and random scores are "
    "drawn.",
)  # fmt: skip
@option(
    "Task", "--task", type=click.Choice(MEASURED),
    standard="classification, retrieval, vqa, nlvr2 or else loss: what model and data are made for",
    help="What is measured: see `vlp evaluate --help`; loss is that of pre-training.",
)  # fmt: skip
@option(
    "Method", "--methods", several=True, metavar="NAME...",
    standard=" ".join(COMPARED),
    help="Methods to compare; `vlp methods` lists all. One that cannot prune this model is "
    "dropped, with the reason.",
)  # fmt: skip
@option(
    "Method", "--sparsity", several=True, metavar="FRACTION...", default=("0.5", "0.75"),
    help="Fractions of the weights to remove.",
)  # fmt: skip
@option(
    "Measuring", "--seeds", type=COUNT, metavar="N", default=1,
    help="How often to repeat with other calibration samples, to see what they change; for "
    "instance 3.",
)  # fmt: skip
@option(
    "Output", "--out", type=PATH, metavar="FOLDER", required=True,
    help="New folder for the figures (compare.csv, compare.json), the report and all masks.",
)  # fmt: skip
@json_option
@reading_options
@run_options
@click.pass_context
def compare(
    context: click.Context,
    out: Path,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Find the method that is best for MODEL and its data.

    Prunes with each method at each sparsity, at once and without fine-tuning, and measures the
    model before and after on samples that no method has seen. Each figure has its standard error;
    methods that cannot be told apart are named. All masks are kept: the best can be used at once.
    """
    from vlp_plugins.jobs.compare import compare as run
    from vlp_plugins.jobs.comparison import comparison_table, sentences
    from vlp_plugins.jobs.held_out import CompareRequest
    from vlp_plugins.jobs.preparation import Loaded
    from vlp_plugins.jobs.recipes import sparsity_of
    from vlp_plugins.jobs.work_dir import work_left

    source = model_source(values)
    data = data_recipe(values)
    values["sparsity"] = tuple(map(sparsity_of, values["sparsity"]))
    request = CompareRequest(data, **values)
    line = command_line(context)
    said: dict[str, str] = {}

    def begin(planned: ComparisonPlan) -> None:
        if not as_json:
            _print_plan(planned)
        said.update({**planned.facts, **planned.left_out})

    with (
        explained_interruption(line, lambda: work_left(out), shown=True),
        data_progress(shown=True, what="pruning and measuring", units="mask sets") as progress,
        steps_shown(),
    ):
        result = run(
            lambda: Loaded.of(source, **data.of_processor),
            request, out, command=line, resume=resume, overwrite=overwrite,
            progress=progress, begin=begin,
        )  # fmt: skip
    if as_json:
        print_json({**result.record, "facts": result.facts, "out": result.out})
        return
    found = result.comparison
    table = comparison_table(found)
    print_table(table.title, table.header, table.rows)
    click.echo()
    _print_left_out({name: why for name, why in found.left_out.items() if name not in said})
    print_lines(sentences(found))
    click.echo("\nto use the best masks:")
    for command in result.apply.values():
        line = f"  {visible(command)}"  # whole, to be copied
        if len(line) > columns():
            line = " \\\n      --out ".join(line.rsplit(" --out ", 1))
        click.echo(line)
    click.echo()
    print_facts({name: fact for name, fact in result.facts.items() if name not in said})
    say(f"written: {result.out}")


def _print_left_out(methods: Mapping[str, str]) -> None:
    print_lines(f"{name} is left out: {why}" for name, why in methods.items())


def _print_plan(planned: ComparisonPlan) -> None:
    """What is about to be done, and how long it takes; with `--quiet` nothing."""
    from vlp_plugins.runtime.numbers import duration

    if verbosity() < 0:
        return
    print_facts(planned.facts)
    _print_left_out(planned.left_out)
    known = f", of which {planned.done} are known" if planned.done else ""
    measuring = duration(planned.measuring_seconds)
    if planned.pruning_seconds is None:
        time = f"{measuring} to measure; how long pruning takes is unknown"
    else:
        both = duration(planned.pruning_seconds + planned.measuring_seconds)
        time = f"about {both}, {duration(planned.pruning_seconds)} of it for pruning"
    say(f"plan: {planned.cells} sets of masks{known}: {time}")
