"""`vlp evaluate`: how well a model does its task, before and after masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import (
    COUNT,
    PATH,
    json_option,
    limit_option,
    model_source,
    option,
    overwrite_option,
    reading_options,
    split_option,
)
from vlp_plugins.cli.program import command_line
from vlp_plugins.cli.terminal import (
    data_progress,
    print_facts,
    print_json,
    print_lines,
    print_table,
)
from vlp_plugins.tasks import MEASURED


@click.command(
    cls=Command,
    short_help="Measure what a model can do, before and after pruning.",
    examples=[
        "vlp evaluate model --task retrieval --data photos --masks masks.safetensors",
        "vlp evaluate model --task retrieval --data photos --split test --out measured",
    ],
)
@click.argument("model")
@option(
    "Task", "--task", type=click.Choice(MEASURED),
    standard="the only one but loss that model and data allow",
    help="What the model is to do: find the caption of an image and the reverse (retrieval), write "
    "captions, answer questions (vqa), name the class of an image, or say whether a statement is "
    "true of two images (nlvr2). Or measure its own loss (loss): of a chat model, on the answers.",
)  # fmt: skip
@option(
    "Data", "--data", metavar="PATH_OR_ID", required=True,
    help="Data to measure on; see above which kinds.",
)  # fmt: skip
@split_option
@option(
    "Model", "--masks", type=PATH, metavar="FILE",
    help="Masks to apply: the model is measured before and after.",
)  # fmt: skip
@option(
    "Model", "--new-weights/--keep-weights", "new_weights", default=None,
    standard="write them if they were made from the weights of MODEL",
    help="Whether the new weights that some masks bring (those of chita, say) are written, or "
    "only zeros.",
)  # fmt: skip
@limit_option
@overwrite_option
@option(
    "Output", "--out", type=PATH, metavar="FOLDER",
    help="New folder for the metrics (evaluation.json) and the report.",
)  # fmt: skip
@option("Data", "--batch-size", type=COUNT, metavar="N", default=32, help="Samples in a batch.")
@option(
    "Task", "--rerank", type=click.IntRange(min=0), metavar="N", default=0,
    help="Retrieval: also order the best N candidates of each query by the matching head of the "
    "model, if it has one (BLIP, X-VLM), such as 32.",
)  # fmt: skip
@option(
    "Task", "--beams", type=COUNT, metavar="N", standard="3, chat models 1",
    help="Captioning and vqa: number of beams in the search for a text.",
)  # fmt: skip
@option(
    "Task", "--longest", type=click.IntRange(min=2), metavar="TOKENS",
    standard="30 for captions, 10 for answers; chat models 64 and 16",
    help="Captioning and vqa: most tokens of a text that the model writes.",
)  # fmt: skip
@option(
    "Task", "--answers", type=PATH, metavar="FILE", standard="answer_list.json of the data",
    help="Vqa: JSON file with the answers that the model chooses among.",
)  # fmt: skip
@option(
    "Task", "--written", is_flag=True,
    help="Vqa: the model writes its answers, rather than choose among those of a list.",
)  # fmt: skip
@reading_options
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    masks: Path | None,
    new_weights: bool | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure MODEL on a task: its metrics, and those after --masks.

    Retrieval and captioning read an image folder with captions, shards, COCO or Flickr30k in
    Karpathy's splits; VQA reads VQAv2 or images with questions in metadata.jsonl; classification
    reads CIFAR (binary), Flowers-102, folders of classes or data sets with labels; nlvr2 reads
    NLVR2 as published or as BLIP and X-VLM list it.
    """
    from vlp_plugins.jobs.evaluate import evaluate as measure
    from vlp_plugins.jobs.evaluate import metrics_table, sentences
    from vlp_plugins.jobs.preparation import Loaded
    from vlp_plugins.jobs.tasks import TaskRequest

    if overwrite and out is None:
        raise click.UsageError("--overwrite replaces the folder --out, and none is given")
    source = model_source(values)
    reading = {name: values.pop(name) for name in ("max_length", "max_pixels")}
    request = TaskRequest(**values)
    with data_progress(shown=True, what="measuring") as progress:
        found = measure(
            lambda: Loaded.of(source, **reading),
            request, masks=masks, new_weights=new_weights, out=out, overwrite=overwrite,
            command=command_line(context), progress=progress,
        )  # fmt: skip
    if as_json:
        print_json({**found.record, "facts": found.facts, "out": found.out})
        return
    table = metrics_table(found)
    print_table(table.title, table.header, table.rows)
    click.echo()
    print_lines(sentences(found))
    print_facts({**found.settings, **found.facts})
    if found.out is not None:
        click.echo(f"written: {found.out}")
