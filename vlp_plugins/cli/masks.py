"""`vlp masks`: show, apply, verify, compare and convert mask files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import model_options, new_file
from vlp_plugins.cli.tables import print_table

if TYPE_CHECKING:
    from vlp_plugins.masks import Masks

NOT_SPARSE = 1
"""Exit code of `vlp masks verify` if the model is not as sparse as the masks."""


@click.group()
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
    if m.note:
        click.echo(m.note)
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
@new_file()
@model_options
def apply(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Applies a mask FILE to MODEL (any of its structure) and saves the pruned model."""
    from vlp_plugins.atomic import check_new_folder
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks import Masks
    from vlp_plugins.saving import save_model

    check_new_folder(target)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **_as_made(found, loading))
    found.apply(loaded, adapter if loading["adapter"] else None)
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
    loaded, adapter = load_model(model, **_as_made(found, loading))
    violations = found.verify(loaded, adapter if loading["adapter"] else None)
    if not violations:
        click.echo(f"ok: all {found.removed:,} removed elements of {len(found)} weights are zero")
        return
    print_table(
        "Not zero where the mask removes",
        ["weight", "parameter", "elements", "of removed"],
        [[v.weight, v.path, f"{v.revived:,}", f"{v.removed:,}"] for v in violations],
    )
    sys.exit(NOT_SPARSE)


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
@new_file()
def invert(file: Path, target: Path) -> None:
    """Keeps what FILE removes: a sanity check of a method."""
    from vlp_plugins.masks import Masks

    inverted = Masks.load(file).invert()
    inverted.save(target)
    click.echo(f"{target}: sparsity {inverted.sparsity:.4%}")


@masks.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@new_file()
@model_options
def import_(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Reads a published .pth FILE (`*_pruning_mask` keys) made for MODEL."""
    from vlp_plugins.atomic import check_new
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.published import import_published
    from vlp_plugins.weights import WeightMap

    check_new(target)
    loaded, adapter = load_model(model, **loading)
    found = import_published(file, WeightMap.of(loaded, adapter), adapter)
    found.save(target)
    click.echo(f"{target}: sparsity {found.sparsity:.4%}")


@masks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@new_file()
@model_options
def export(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Writes FILE as a published .pth file, for the original code of MODEL."""
    from vlp_plugins.atomic import check_new
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks import Masks
    from vlp_plugins.masks.published import export_published
    from vlp_plugins.weights import WeightMap

    check_new(target)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **loading)
    export_published(found, target, WeightMap.of(loaded, adapter), adapter)
    click.echo(f"{target}: {len(found)} masks, sparsity {found.sparsity:.4%}")


def _as_made(found: Masks, loading: dict[str, Any]) -> dict[str, Any]:
    """Loads a model for the adapter that the masks were made with, unless another is asked for."""
    from vlp_plugins.loading import MODULE

    any_model = found.manifest.adapter == MODULE and loading["adapter"] is None
    return loading | {"adapter": MODULE} if any_model else loading
