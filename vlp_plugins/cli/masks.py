"""`vlp masks`: show, apply, verify, compare and convert mask files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.options import PATH, model_options, target_option
from vlp_plugins.cli.tables import print_lines, print_table

if TYPE_CHECKING:
    from vlp_plugins.masks.masks import Masks

_file = click.argument("file", type=PATH)

NOT_SPARSE = 1
"""Exit code of `vlp masks verify` if the model is not as sparse as the masks."""


@click.group()
def masks() -> None:
    """Apply, verify, compare and convert mask files."""


@masks.command()
@_file
def show(file: Path) -> None:
    """What a mask FILE is: method, sparsity per modality, where it comes from."""
    from vlp_plugins.masks.masks import Masks

    found = Masks.load(file)
    m = found.manifest
    print_lines(
        [
            repr(found),
            f"made by {m.made_by} with adapter {m.adapter!r}, structure {m.structure}",
            f"parameters {m.parameters}, seed {m.seed}, calibration {m.calibration}",
            *([m.note] if m.note else []),
            *[f"warning: {sentence}" for sentence in _doubts(file, found)],
        ]
    )
    if found.new_values is not None:
        click.echo(f"brings {_new_weights(found)}; apply --keep-weights leaves them out")
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
@_file
@click.argument("model")
@target_option
@click.option(
    "--keep-weights", is_flag=True, help="Zero what is removed, but write no new weights."
)
@click.option(
    "--sparse", is_flag=True, help="Save bits and values instead of zeros, in less space."
)
@model_options
def apply(
    file: Path, model: str, target: Path, keep_weights: bool, sparse: bool, **loading: Any
) -> None:
    """Applies a mask FILE to MODEL (any of its structure) and saves the pruned model.

    Masks of methods that change what they keep, such as CHITA, bring new weights, which are
    written, too. With --sparse other commands read the folder as usual, and Python reads it by
    vlp_plugins.masks.sparse.load_sparse; transformers alone does not.
    """
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.masks.sparse import save_sparse
    from vlp_plugins.models.saving import save_model
    from vlp_plugins.runtime.files import check_new_folder, reserved

    check_new_folder(target)
    with reserved(target):
        found = Masks.load(file)
        loaded, adapter = load_model(model, **_as_made(found, loading))
        found.apply(loaded, adapter if loading["adapter"] else None, values=not keep_weights)
        if sparse:
            size = save_sparse(loaded, target, masks=found, adapter=adapter, source=model)
        else:
            save_model(loaded, target, source=model)
        click.echo(f"{target}: {found.sparsity:.4%} of the prunable weights are zero")
        if found.new_values is not None:
            click.echo(
                f"the others were {'left as they are' if keep_weights else 'given new values'}"
            )
        if sparse:
            click.echo(str(size))


@masks.command()
@_file
@click.argument("model")
@model_options
def verify(file: Path, model: str, **loading: Any) -> None:
    """Is MODEL really as sparse as the mask FILE says? Exit code 1 if not."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.masks import Masks

    found = Masks.load(file)
    loaded, adapter = load_model(model, **_as_made(found, loading))
    for sentence in _doubts(file, found):
        click.echo(f"warning: {sentence}", err=True)
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
@click.argument("one", type=PATH)
@click.argument("other", type=PATH)
def diff(one: Path, other: Path) -> None:
    """How alike two mask files are, per modality."""
    from vlp_plugins.masks.compare import distances
    from vlp_plugins.masks.masks import Masks

    first, second = Masks.load(one), Masks.load(other)
    header = ["modality", "elements", "differing", "agreement", "kept by both / by either"]
    rows = {
        name: [name, f"{o.total:,}", f"{o.differing:,}", f"{o.agreement:.4%}", f"{o.iou:.4f}"]
        for name, o in first.compare(second).items()
    }
    valued = [path for path, each in ((one, first), (other, second)) if each.new_values is not None]
    if len(valued) == 2:
        header.append("new weights apart")  # where both keep an element
        for name, distance in distances(first, second).items():
            rows[name].append(f"{distance:.4%}")
    print_table("", header, list(rows.values()))
    if len(valued) == 1:
        click.echo(f"only {valued[0]} brings new weights of what it keeps")


@masks.command()
@_file
@target_option
def invert(file: Path, target: Path) -> None:
    """Keeps what FILE removes: a sanity check of a method."""
    from vlp_plugins.masks.masks import Masks

    found = Masks.load(file)
    inverted = found.invert()
    inverted.save(target)
    if found.new_values is not None:
        click.echo(f"left out: {_new_weights(found)}", err=True)
    click.echo(f"{target}: sparsity {inverted.sparsity:.4%}")


@masks.command("import")
@_file
@click.argument("model")
@target_option
@model_options
def import_(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Reads a published .pth FILE (`*_pruning_mask` keys) made for MODEL."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.published_files import import_published
    from vlp_plugins.models.weights import WeightMap
    from vlp_plugins.runtime.files import check_new

    check_new(target)
    loaded, adapter = load_model(model, **loading)
    found = import_published(file, WeightMap.of(loaded, adapter), adapter)
    found.save(target)
    click.echo(f"{target}: sparsity {found.sparsity:.4%}")


@masks.command()
@_file
@click.argument("model")
@target_option
@model_options
def export(file: Path, model: str, target: Path, **loading: Any) -> None:
    """Writes FILE as a published .pth file, for the original code of MODEL."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.masks.published_files import export_published
    from vlp_plugins.models.weights import WeightMap
    from vlp_plugins.runtime.files import check_new

    check_new(target)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **loading)
    export_published(found, target, WeightMap.of(loaded, adapter), adapter)
    click.echo(f"{target}: {len(found)} masks, sparsity {found.sparsity:.4%}")
    if found.new_values is not None:
        click.echo(
            f"warning: left out {_new_weights(found)}: published files hold masks alone, under "
            "which the dense weights are another model; `vlp masks apply` writes a whole one",
            err=True,
        )


def _doubts(file: Path, found: Masks) -> list[str]:
    """What may be wrong with masks because of the version that made them."""
    return found.manifest.doubts(of_trial=(file.parent / "trial.json").is_file())


def _new_weights(found: Masks) -> str:
    from vlp_plugins.runtime.memory import text_of

    return f"{text_of(found.values_bytes)} of new weights, for the {found.kept:,} kept elements"


def _as_made(found: Masks, loading: dict[str, Any]) -> dict[str, Any]:
    """Loads a model for the adapter that the masks were made with, unless another is asked for."""
    from vlp_plugins.loading import MODULE

    any_model = found.manifest.adapter == MODULE and loading["adapter"] is None
    return loading | {"adapter": MODULE} if any_model else loading
