"""`vlp plan`: what `vlp prune` would do and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import json_option, read_recipe, recipe_options
from vlp_plugins.cli.terminal import counts_record, print_counts, print_json, print_table, say

if TYPE_CHECKING:
    from vlp_plugins.jobs.plan import Plan, PlannedDimensions
    from vlp_plugins.jobs.preparation import Prepared


@click.command(
    cls=Command,
    short_help="Say what `vlp prune` would remove and cost.",
    examples=[
        "vlp plan --model model --data photos --sparsity 0.75",
        "vlp plan --model model --method itersnip --data photos --sparsity 0.5 0.75",
    ],
)
@recipe_options
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Say how much `vlp prune` would remove, and how much memory and time it would take.

    It takes the options of `vlp prune`, reads no images and writes nothing. The time is that of
    two batches of blank images, run and multiplied. Of a folder with a config.json and no weights
    it says all but the time.
    """
    from vlp_plugins.jobs.plan import plan_run
    from vlp_plugins.jobs.preparation import prepare
    from vlp_plugins.models.inspection import groups_of

    recipe = read_recipe(**options)
    job = prepare(recipe, planned=True)
    reads_data = job.method.reads_data and recipe.statistics is None
    bare = job.device.type == "meta"
    planned = plan_run(job)
    if as_json:
        print_json(_record(job, planned, planned.passes if reads_data else 0))
        return
    say(f"{recipe.method} on {recipe.model}: {job.weights.numel:,} prunable weights")
    print_table(
        "Groups",
        ["modality", "layers", "weights", "elements"],
        [[g.modality, g.layers, g.tensors, f"{g.elements:,}"] for g in groups_of(job.weights)],
    )
    _print_counts(job, planned)
    _print_memory(job, planned)
    click.secho("\nData", bold=True)
    say(f"passes over the data: {planned.passes if reads_data else 0}")
    if reads_data and (planned.timing.seconds_per_batch is not None or planned.dimensions is None):
        _print_time(job, planned)
    _print_dimensions(planned.dimensions)
    if planned.cost is not None and planned.cost.notes:
        click.secho("\nHow", bold=True)
        for note in planned.cost.notes:
            say(note)
    click.secho("\nIn all", bold=True)
    say(f"{_total_time(planned)}, {_total_memory(planned)}")
    if bare:
        say(
            f"{recipe.model} has no weights: counts and memory follow from their shapes, and "
            "nothing was timed; what activations take comes on top"
        )
        return
    read = " and reading images come" if planned.passes and reads_data else " comes"
    say(f"timed on this machine; loading the model{read} on top")


def _total_time(planned: Plan) -> str:
    from vlp_plugins.runtime.numbers import duration

    timing = planned.timing
    if planned.seconds is not None:
        return f"about {duration(planned.seconds)}"
    if timing.seconds_per_batch is None:
        return "for a time that only the run will tell"
    return (
        f"about {duration(timing.seconds_per_batch)} for each batch, whose number is unknown "
        f"(--batches, or --data that is there), and {duration(timing.other_seconds)} in addition"
    )


def _total_memory(planned: Plan) -> str:
    text = f"peak memory about {_gigabytes(planned.peak_bytes)}"
    if planned.device_peak_bytes is not None:
        text += f", of the GPU about {_gigabytes(planned.device_peak_bytes)}"
    disk = 0 if planned.cost is None else planned.cost.disk_bytes
    return f"{text} (+ {_gigabytes(disk)} on disk)" if disk >= _SHOWN_BYTES else text


_SHOWN_BYTES = 10**8
"""Less on the disk is not worth a word."""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def _record(job: Prepared, planned: Plan, passes: int) -> dict[str, Any]:
    """A plan as JSON has it; see docs/json.md."""
    from vlp_plugins.jobs.preparation import title_of

    cost, first = planned.cost, planned.dimensions
    return {
        "model": job.recipe.model,
        "method": job.recipe.method,
        "prunable": job.weights.numel,
        "targets": [
            {"target": title_of(target), **counts_record(counts)}
            for target, counts in zip(job.targets, planned.counts, strict=True)
        ],
        "bytes": {
            "model": planned.model_bytes,
            "statistics": planned.statistics_bytes,
            "method": None if cost is None else cost.ram_bytes,
            "masks": planned.masks_bytes,
            "peak": planned.peak_bytes,
            "device_peak": planned.device_peak_bytes,
            "disk": None if cost is None else cost.disk_bytes,
        },
        "passes": passes,
        "seconds_per_batch": planned.timing.seconds_per_batch,
        "seconds": planned.seconds,
        "dimensions": None if first is None else {
            "passes": len(first.plan.passes),
            "seconds_per_batch": first.seconds_per_batch,
            "forward_seconds": first.forward_seconds,
            "neighbour_seconds": first.neighbour_seconds,
        },
        "notes": () if cost is None else cost.notes,
    }  # fmt: skip


def _print_counts(job: Prepared, planned: Plan) -> None:
    from vlp_plugins.jobs.preparation import title_of

    click.secho("\nCounts", bold=True)
    print_counts({title_of(t): c for t, c in zip(job.targets, planned.counts, strict=True)})
    if all(len(counts) == 1 for counts in planned.counts):
        say("how modalities and layers share it depends on the data: known after the run")
    if job.published and planned.cost is not None:
        say("the published variant may remove a few elements more or fewer")


def _print_memory(job: Prepared, planned: Plan) -> None:
    from vlp_plugins.jobs.facts import LARGE_STATISTICS

    cost = planned.cost
    rows = {
        "model": planned.model_bytes,
        "statistics": planned.statistics_bytes if cost is None else None,
        "gradients, solvers, copies": None if cost is None else cost.ram_bytes,
        "masks": planned.masks_bytes,
        "peak of the process": planned.peak_bytes,
        "peak of the GPU": planned.device_peak_bytes,
        "files on the disk meanwhile": None if cost is None else cost.disk_bytes,
    }
    print_table(
        "Memory",
        ["what", "GB"],
        [[name, f"{size / 1e9:.3f}"] for name, size in rows.items() if size is not None],
    )
    if planned.statistics_bytes > LARGE_STATISTICS and not job.recipe.keep_statistics:
        click.echo("the statistics are not written: --keep-statistics writes them")


def _print_dimensions(planned: PlannedDimensions | None) -> None:
    if planned is None:
        return
    from vlp_plugins.runtime.numbers import duration

    click.secho("\nIntrinsic dimensions, first", bold=True)
    for line in planned.plan.lines:
        say(line)
    say(
        f"forward passes: about {duration(planned.forward_seconds)}, "
        f"{planned.seconds_per_batch:.2f} s a batch; the search for neighbours: about "
        f"{duration(planned.neighbour_seconds)}"
    )
    say("--id-profile takes the dimensions of an earlier run (its id-profile.json)")


def _print_time(job: Prepared, planned: Plan) -> None:
    from vlp_plugins.runtime.numbers import duration

    timing, cost = planned.timing, planned.cost
    each = timing.seconds_per_batch
    if each is None:
        say("a batch: its time is unknown until the method runs")
        return
    both = ", forward and backward" if cost is not None and cost.gradient_batches else ""
    say(f"a batch of {job.recipe.data.batch_size}{both}: about {each:.2f} s")
    if not timing.batches:
        return
    reading = f"about {duration(timing.batches * each)}"
    if cost is None:
        say(f"{timing.batches:,} batches: {reading}")
        return
    say(
        f"{timing.batches:,} of them in all: {reading}, and {duration(timing.other_seconds)} "
        "in addition, for masks and solving"
    )
