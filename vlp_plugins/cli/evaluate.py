"""`vlp evaluate`: how well a model does its task, before and after masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    column_options,
    model_options,
    model_source,
    processor_option,
    split_option,
)
from vlp_plugins.cli.program import command_line, data_progress
from vlp_plugins.cli.tables import print_facts, print_lines, print_table
from vlp_plugins.tasks import TASKS


@click.command()
@click.argument("model")
@click.option("--task", type=click.Choice(TASKS), required=True)
@click.option("--data", required=True, help="Folder of a data set (see below), file or id.")
@split_option
@click.option("--masks", type=PATH, help="Mask file: measure before and after it.")
@click.option(
    "--new-weights/--keep-weights", "new_weights", default=None,
    help="Whether new weights of the masks (CHITA) are written; if left out, where they were "
    "computed from MODEL's, so that what MODEL has learned since stays.",
)  # fmt: skip
@click.option("--limit", type=COUNT, help="First images (questions) only.")
@click.option("--out", type=PATH, help="New folder for JSON and report.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option(
    "--rerank", type=click.IntRange(min=0), default=0, show_default=True,
    help="Retrieval: also with so many candidates of every query in the matching head's order.",
)  # fmt: skip
@click.option(
    "--beams", "num_beams", type=COUNT, default=3, show_default=True,
    help="Of the search for captions and answers.",
)  # fmt: skip
@click.option(
    "--longest", "length", type=click.IntRange(min=2),
    help="Most tokens of a text that is written: 30 for captions, 10 for answers if left out.",
)  # fmt: skip
@click.option(
    "--answers", type=PATH,
    help="VQA: file of answers to choose among; answer_list.json of the data if left out.",
)  # fmt: skip
@click.option("--written", is_flag=True, help="VQA: answers are written, not chosen.")
@column_options
@click.option("--max-length", type=COUNT, help="Most tokens of a text read.")
@processor_option
@model_options
@click.pass_context
def evaluate(
    context: click.Context,
    masks: Path | None,
    new_weights: bool | None,
    out: Path | None,
    max_length: int | None,
    **values: Any,
) -> None:
    """Measures MODEL on a task: its metrics, and those after --masks.

    Retrieval and captioning read an image folder with captions, shards, COCO or Flickr30k in
    Karpathy's splits; VQA reads VQAv2 or images with questions in metadata.jsonl; classification
    reads CIFAR (binary), Flowers-102, folders of classes or data sets with labels.
    """
    from vlp_plugins.jobs.evaluate import evaluate as measure
    from vlp_plugins.jobs.evaluate import metrics_table, sentences
    from vlp_plugins.jobs.inputs import Loaded
    from vlp_plugins.jobs.tasks import TaskRequest

    source = model_source(values)
    request = TaskRequest(**values)
    with data_progress(shown=True, what="measuring") as progress:
        found = measure(
            lambda: Loaded.of(source, max_length=max_length),
            request, masks=masks, new_weights=new_weights, out=out,
            command=command_line(context), progress=progress,
        )  # fmt: skip
    table = metrics_table(found)
    print_table(table.title, table.header, table.rows)
    click.echo()
    print_lines(sentences(found))
    print_facts({**found.settings, **found.facts})
    if found.out is not None:
        click.echo(f"written: {found.out}")
