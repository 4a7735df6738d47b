"""The `vlp` command. Commands are thin: each reads its options, calls the API, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vlp_plugins import __version__
from vlp_plugins.errors import VlpError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Group(click.Group):
    """Prints errors that a user can mend on one line and exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except VlpError as error:
            err.print(f"[bold red]error:[/] {' '.join(str(error).split())}", markup=True)
            ctx.exit(2)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlp")
def main() -> None:
    """Pruning methods made for vision-language models."""


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
    out.print(f"{found.model}, adapter {found.adapter!r}, structure {found.weights.structure}")
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
    out.print(f"{found!r}")
    out.print(f"made by {m.made_by} with adapter {m.adapter!r}, structure {m.structure}")
    out.print(f"parameters {m.parameters}, seed {m.seed}, calibration {m.calibration}")
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
    out.print(f"{target}: {found.sparsity:.4%} of the prunable weights are zero")


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
        out.print(f"ok: all {found.removed:,} removed elements of {len(found)} weights are zero")
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
    out.print(f"{target}: sparsity {inverted.sparsity:.4%}")


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
    out.print(f"{target}: sparsity {found.sparsity:.4%}")


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
    out.print(f"{target}")


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """A table on standard output, as wide as its content."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)
