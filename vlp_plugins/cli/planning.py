"""`vlp plan`: what `vlp prune` would do and cost."""

from __future__ import annotations

from typing import Any

import click

from vlp_plugins.cli.options import ManyValues, read_recipe, recipe_options
from vlp_plugins.cli.tables import print_masks, print_table


@click.command(cls=ManyValues)
@recipe_options
def plan(**options: Any) -> None:
    """What RECIPE and options would do and cost, said before any data is read.

    Takes what `vlp prune` takes; the data is not touched, and nothing is written.
    """
    from vlp_plugins.inspection import groups_of
    from vlp_plugins.job import prepare, title_of
    from vlp_plugins.plan import plan_run

    recipe = read_recipe(**options)
    job = prepare(recipe)
    reads_data = bool(job.method.needs) and recipe.statistics is None
    planned = plan_run(
        job.model,
        job.adapter,
        job.method,
        job.targets,
        processor=job.processor() if job.method.needs else None,
        batch_size=recipe.data.batch_size if reads_data else 1,
        floor=recipe.floor,
        published=job.published,
        save_model=recipe.save_model,
    )
    click.echo(f"{recipe.method} on {recipe.model}: {job.weights.numel:,} prunable weights")
    print_table(
        "Groups",
        ["modality", "layers", "weights", "elements"],
        [[g.modality, g.layers, g.tensors, f"{g.elements:,}"] for g in groups_of(job.weights)],
    )
    click.secho("\nCounts", bold=True)
    print_masks({title_of(t): m for t, m in zip(job.targets, planned.masks, strict=True)})
    rows = {
        "model": planned.model_bytes,
        "statistics": planned.statistics_bytes,
        "masks": planned.masks_bytes,
        "peak of the process": planned.peak_bytes,
        "peak of the GPU": planned.device_peak_bytes,
    }
    print_table(
        "Memory",
        ["what", "GB"],
        [[name, f"{size / 1e9:.3f}"] for name, size in rows.items() if size is not None],
    )
    click.secho("\nData", bold=True)
    click.echo(f"passes over the data: {planned.passes if reads_data else 0}")
    if reads_data and planned.seconds_per_batch is not None:
        size, total = recipe.data.batch_size, recipe.data.batches
        click.echo(f"a batch of {size}: about {planned.seconds_per_batch:.2f} s")
        if total:
            minutes = total * planned.seconds_per_batch / 60
            click.echo(f"{total:,} batches: about {minutes:.1f} min")
