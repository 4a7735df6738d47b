"""The `vlp` command. Commands are thin: each reads its options, calls the API, prints."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from vlp_plugins import __version__
from vlp_plugins.errors import VlpError

if TYPE_CHECKING:
    from vlp_plugins.masks import Masks


class Group(click.Group):
    """Prints errors that a user can mend on one line and exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except VlpError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlp")
def main() -> None:
    """Pruning methods made for vision-language models."""
    # transformers draws a bar for every file that it reads; set before it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how a model is loaded."""
    for option in (
        click.option("--adapter", help="Name of the adapter; found by itself if left out."),
        click.option("--dtype", default="float32", show_default=True),
        click.option("--device", help="cpu, cuda, ...; a GPU if there is one."),
    ):
        command = option(command)
    return command


@main.command()
def plugins() -> None:
    """Every plug-in: what it registered, or why it failed."""
    from vlp_plugins.plugins import plugins_table, registry

    rows = plugins_table(registry().plugins())
    print_table("", list(rows[0]) if rows else ["plug-in"], [list(row.values()) for row in rows])


@main.command()
@click.argument("model")
@click.option("--weights", is_flag=True, help="One row per weight, with all its names.")
@model_options
def inspect(model: str, weights: bool, **loading: Any) -> None:
    """What is pruned in MODEL, what is not and why, and what is tied."""
    from vlp_plugins.inspection import inspect_model
    from vlp_plugins.loading import load_model

    found = inspect_model(*load_model(model, **loading))
    click.echo(f"{found.model}, adapter {found.adapter!r}, structure {found.weights.structure}")
    print_table(
        "Prunable weights (each shared one counted once)",
        ["modality", "layers", "weights", "of them shared", "elements"],
        [
            *([g.modality, g.layers, g.tensors, g.shared, f"{g.elements:,}"] for g in found.groups),
            ["all", "", len(found.weights), "", f"{found.prunable:,}"],
        ],
    )
    print_table(
        "Not pruned",
        ["reason", "tensors", "elements", "for example"],
        [[e.reason, e.tensors, f"{e.elements:,}", e.example] for e in found.excluded],
    )
    if weights:
        print_table(
            "Weights",
            ["name", "modality", "depth", "shape", "parameters"],
            [
                [w.name, w.modality, w.depth, "x".join(map(str, w.shape)), "\n".join(w.aliases)]
                for w in found.weights.values()
            ],
        )


class ManyValues(click.Command):
    """Lets `--sparsity` and `--parameter` take several values: `--sparsity 0.63 0.75 0.9`."""

    many = ("--sparsity", "--parameter")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the option before each of its values."""
        spread: list[str] = []
        current = None
        for arg in args:
            if arg in self.many:
                current = arg
            elif current is None or arg.startswith("-") or arg.endswith((".yaml", ".yml")):
                current = None
                spread.append(arg)
            else:
                spread += [current, arg]
        return super().parse_args(ctx, spread)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `vlp_plugins.recipes.OPTIONS`; each overrides the recipe's key."""
    text: dict[str, Any] = {"default": None}
    number: dict[str, Any] = {"default": None, "type": int}
    options = [
        click.argument("recipe", required=False, type=click.Path(path_type=Path)),
        click.option("--model", **text, help="Local folder, checkpoint file or hub id."),
        click.option("--method", **text, help="Name of the method (see `vlp plugins`)."),
        click.option("--sparsity", multiple=True, help="0.75, or vision=0.5,text=0.8; several."),
        click.option("--data", **text, help="Image folder with captions, tar shards, data set."),
        click.option("--out", **text, help="New folder for masks and report."),
        click.option("--batches", **number, help="Calibration batches; all if left out."),
        click.option("--batch-size", **number),
        click.option("--parameter", multiple=True, help="name=value, of the method; several."),
        click.option("--allocation", **text, help="global, modality, layer, row, keep=2,of=4."),
        click.option("--floor", default=None, type=float, help="Least fraction each layer keeps."),
        click.option("--owners", default=None, type=click.Choice(["all", "first"])),
        click.option("--variant", default=None, type=click.Choice(["default", "published"])),
        click.option("--statistics", **text, help="Statistics of an earlier run instead of data."),
        click.option("--seed", **number),
        click.option("--split", **text),
        click.option("--shuffle-seed", **number),
        click.option("--image-column", **text),
        click.option("--caption-column", **text),
        click.option("--max-length", **number),
        click.option("--processor", **text, help="Where the processor is, if not at the model."),
        click.option("--adapter", **text),
        click.option("--dtype", **text),
        click.option("--device", **text),
        click.option("--save-model", is_flag=True, default=None, help="Write pruned models too."),
        click.option("--checkpoint-every", **number),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_recipe(recipe: Path | None, **options: Any) -> Any:
    """The recipe file, or an empty one, with the options of the command line on top."""
    from vlp_plugins.recipes import Recipe, load_recipe, parameter_of, sparsity_of

    options["sparsity"] = tuple(map(sparsity_of, options["sparsity"])) or None
    options["parameter"] = dict(map(parameter_of, options["parameter"])) or None
    return (load_recipe(recipe) if recipe else Recipe()).with_options(**options)


@main.command(cls=ManyValues)
@recipe_options
@click.option("--resume", is_flag=True, help="Continue an interrupted data pass.")
def prune(resume: bool, **options: Any) -> None:
    """Prunes as RECIPE and options say: masks, layers.csv and report.html in --out."""
    from vlp_plugins.job import run

    recipe = read_recipe(**options)
    with data_progress() as progress:
        result = run(recipe, progress=progress, resume=resume)
    print_masks(result.masks)
    for name, value in result.facts.items():
        click.echo(f"{name}: {value}")
    click.echo(f"written: {result.out}")


@main.command(cls=ManyValues)
@recipe_options
def plan(**options: Any) -> None:
    """What RECIPE and options would do and cost, said before any data is read."""
    from vlp_plugins.job import prepare, title_of
    from vlp_plugins.plan import plan_run

    recipe = read_recipe(**options)
    job = prepare(recipe)
    needed = bool(job.method.needs)
    planned = plan_run(
        job.model,
        job.adapter,
        job.method,
        job.targets,
        processor=job.processor() if needed else None,
        batch_size=recipe.data.batch_size,
        floor=recipe.floor,
        published=job.published,
    )
    click.echo(f"{recipe.method} on {recipe.model}: {job.weights.numel:,} prunable weights")
    print_masks({title_of(t): m for t, m in zip(job.targets, planned.masks, strict=True)})
    gigabytes = {
        "model": planned.model_bytes,
        "statistics": planned.statistics_bytes,
        "masks": planned.masks_bytes,
        "expected peak": planned.peak_bytes,
    }
    click.echo("memory: " + ", ".join(f"{k} {v / 1e9:.3f} GB" for k, v in gigabytes.items()))
    click.echo(f"passes over the data: {planned.passes}")
    if planned.seconds_per_batch is not None:
        total = recipe.data.batches
        text = f", {total * planned.seconds_per_batch / 60:.1f} min for {total}" if total else ""
        click.echo(f"a batch of {recipe.data.batch_size}: {planned.seconds_per_batch:.2f} s{text}")


@main.group()
def masks() -> None:
    """Apply, verify, compare and convert mask files."""


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """What a mask FILE is: method, sparsity per modality, where it comes from."""
    from vlp_plugins.masks import Masks

    found = Masks.load(file)
    m = found.manifest
    click.echo(f"{found!r}")
    click.echo(f"made by {m.made_by} with adapter {m.adapter!r}, structure {m.structure}")
    click.echo(f"parameters {m.parameters}, seed {m.seed}, calibration {m.calibration}")
    counts = found.counts()
    print_table(
        "",
        ["modality", "sparsity", "kept", "elements"],
        [
            [name, f"{c.sparsity:.4%}", f"{c.kept:,}", f"{c.total:,}"]
            for name, c in [*counts.by_modality.items(), ("all", counts.all)]
        ],
    )


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", "target", type=click.Path(path_type=Path), required=True)
@model_options
def apply(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Applies a mask FILE to MODEL (any of its structure) and saves the pruned model."""
    from vlp_plugins.atomic import check_new_folder
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks import Masks
    from vlp_plugins.saving import save_model

    check_new_folder(target)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **loading)
    found.apply(loaded, adapter)
    save_model(loaded, target, source=model)
    click.echo(f"{target}: {found.sparsity:.4%} of the prunable weights are zero")


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@model_options
def verify(file: Path, model: str, **loading: Any) -> None:
    """Is MODEL really as sparse as the mask FILE says? Exit code 1 if not."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks import Masks

    found = Masks.load(file)
    violations = found.verify(*load_model(model, **loading))
    if not violations:
        click.echo(f"ok: all {found.removed:,} removed elements of {len(found)} weights are zero")
        return
    print_table(
        "Not zero where the mask removes",
        ["weight", "parameter", "elements", "of removed"],
        [[v.weight, v.path, f"{v.revived:,}", f"{v.removed:,}"] for v in violations],
    )
    sys.exit(1)


@masks.command()
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
def diff(one: Path, other: Path) -> None:
    """How alike two mask files are, per modality."""
    from vlp_plugins.masks import Masks

    overlaps = Masks.load(one).compare(Masks.load(other))
    print_table(
        "",
        ["modality", "elements", "differing", "agreement", "kept by both / by either"],
        [
            [name, f"{o.total:,}", f"{o.differing:,}", f"{o.agreement:.4%}", f"{o.iou:.4f}"]
            for name, o in overlaps.items()
        ],
    )


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", "target", type=click.Path(path_type=Path), required=True)
def invert(file: Path, target: Path) -> None:
    """Keeps what FILE removes: a sanity check of a method."""
    from vlp_plugins.masks import Masks

    inverted = Masks.load(file).invert()
    inverted.save(target)
    click.echo(f"{target}: sparsity {inverted.sparsity:.4%}")


@masks.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", "target", type=click.Path(path_type=Path), required=True)
@model_options
def import_(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Reads a published .pth FILE (`*_pruning_mask` keys) made for MODEL."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.published import import_published
    from vlp_plugins.weights import WeightMap

    loaded, adapter = load_model(model, **loading)
    found = import_published(file, WeightMap.of(loaded, adapter), adapter)
    found.save(target)
    click.echo(f"{target}: sparsity {found.sparsity:.4%}")


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--out", "target", type=click.Path(path_type=Path), required=True)
@model_options
def export(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Writes FILE as a published .pth file, for the original code of MODEL."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks import Masks
    from vlp_plugins.masks.published import export_published
    from vlp_plugins.weights import WeightMap

    loaded, adapter = load_model(model, **loading)
    export_published(Masks.load(file), target, WeightMap.of(loaded, adapter), adapter)
    click.echo(f"{target}")


def print_masks(masks: Mapping[str, Masks]) -> None:
    """Sparsity and kept elements per modality, one row per mask set."""
    rows = []
    for title, each in masks.items():
        counts = each.counts()
        for name, count in [*counts.by_modality.items(), ("all", counts.all)]:
            removed, kept = f"{count.removed:,}", f"{count.kept:,}"
            rows.append([title, name, f"{count.sparsity:.4%}", removed, kept])
    print_table("", ["target", "modality", "sparsity", "removed", "kept"], rows)


@contextmanager
def data_progress() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar with the time left, on standard error; silent where nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("reading data"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """A table on standard output. Nothing is cut, so that it can be read by programs too."""
    cells = [header, *([str(cell).replace("\n", ", ") for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numbers = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    if title:
        click.secho(f"\n{title}", bold=True)
    for row in cells:
        texts = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        click.echo("  ".join(texts).rstrip())


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit()
