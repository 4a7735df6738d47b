"""`vlp masks`: show, apply, verify, compare and convert mask files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Group
from vlp_plugins.cli.options import (
    PATH,
    grouped,
    json_option,
    model_options,
    option,
    written_options,
)
from vlp_plugins.cli.terminal import counts_record, print_json, print_lines, print_table, say

if TYPE_CHECKING:
    from vlp_plugins.masks.manifest import Count
    from vlp_plugins.masks.masks import Masks

_file = click.argument("file", type=PATH)
_file_and_model = grouped(_file, click.argument("model"))

NOT_SPARSE = 1
"""Exit code of `vlp masks verify` if the model is not as sparse as the masks."""


@click.group(
    cls=Group,
    short_help="Apply, verify, compare and convert masks.",
    examples=[
        "vlp masks show masks.safetensors",
        "vlp masks apply masks.safetensors model --out pruned-model",
    ],
)
def masks() -> None:
    """Work with mask files, which say of each weight whether it stays."""


@masks.command(
    short_help="Say what a mask file is.",
    examples=[
        "vlp masks show masks.safetensors",
    ],
)
@_file
@json_option
def show(file: Path, as_json: bool) -> None:
    """Say what a mask FILE is: method, sparsity of each modality, where it comes from."""
    from vlp_plugins.masks.masks import Masks

    found = Masks.load(file)
    if as_json:
        print_json(_record(file, found))
        return
    m = found.manifest
    print_lines(
        [
            repr(found),
            f"made by {m.made_by} with adapter {m.adapter!r}, structure {m.structure}",
            f"parameters: {_items(m.parameters)}",
            f"seed: {m.seed}",
            f"calibration: {_items(m.calibration) if m.calibration else 'no data'}",
            *([m.note] if m.note else []),
            *[f"warning: {sentence}" for sentence in _doubts(file, found)],
        ]
    )
    if found.new_values is not None:
        say(f"brings {_new_weights(found)}; apply --keep-weights leaves them out")
    print_table(
        "",
        ["modality", "sparsity", "kept", "elements"],
        [
            [name, f"{c.sparsity:.4%}", f"{c.kept:,}", f"{c.total:,}"]
            for name, c in _counts(found).items()
        ],
    )


@masks.command(
    short_help="Write a pruned model.",
    examples=[
        "vlp masks apply masks.safetensors model --out pruned-model",
        "vlp masks apply masks.safetensors model --sparse --out small",
    ],
)
@_file_and_model
@written_options
@option(
    "Model", "--keep-weights", is_flag=True,
    help="Write zeros only, not the new weights that some masks bring (those of chita, say).",
)  # fmt: skip
@option(
    "Output", "--sparse", is_flag=True,
    help="Save one bit for each weight and the values that stay, which takes less space. The "
    "commands of vlp read such a folder, and vlp_plugins.masks.sparse.load_sparse in Python; "
    "transformers alone does not.",
)  # fmt: skip
@model_options
def apply(
    file: Path,
    model: str,
    target: Path,
    overwrite: bool,
    keep_weights: bool,
    sparse: bool,
    **loading: Any,
) -> None:
    """Set the weights of MODEL that a mask FILE removes to zero, and save the pruned model.

    MODEL is the one that was pruned, or another with the same layers, fine-tuned for example.
    Masks of methods that change what they keep, such as CHITA, bring new weights, which are
    written too.
    """
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.apply import save_pruned
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.masks.sparse import SPARSE_FILE, save_sparse
    from vlp_plugins.models.saving import ORIGIN_FILE
    from vlp_plugins.runtime.files import check_new_folder, reserved

    _check_order(file, model)
    mark = SPARSE_FILE if sparse else ORIGIN_FILE
    check_new_folder(target, mark=mark, overwrite=overwrite)
    with reserved(target):
        found = Masks.load(file)
        loaded, adapter = load_model(model, **_as_made(found, loading))
        chosen = adapter if loading["adapter"] else None
        if sparse:
            found.apply(loaded, chosen, values=not keep_weights)
            size = save_sparse(
                loaded, target, masks=found, adapter=adapter, source=model, overwrite=overwrite
            )
        else:
            save_pruned(
                found,
                loaded,
                chosen,
                target,
                source=model,
                values=not keep_weights,
                keep=False,
                overwrite=overwrite,
                origin={"model": model, "masks": str(file)},
            )
        whole = found.model_sparsity
        of_model = "" if whole is None else f", {whole:.1%} of the whole model"
        say(f"{target}: {found.sparsity:.4%} of the prunable weights are zero{of_model}")
        if found.new_values is not None:
            say(f"the others were {'left as they are' if keep_weights else 'given new values'}")
        if sparse:
            say(str(size))


@masks.command(
    short_help="Check that a model is as sparse as its masks.",
    examples=[
        "vlp masks verify masks.safetensors pruned-model",
    ],
)
@_file_and_model
@model_options
@json_option
def verify(file: Path, model: str, as_json: bool, **loading: Any) -> None:
    """Check that every weight of MODEL that a mask FILE removes is zero; exit code 1 if not."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.models.weights import WeightMap
    from vlp_plugins.report.layers import whole_sparsity

    _check_order(file, model)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **_as_made(found, loading))
    for sentence in _doubts(file, found):
        say(f"warning: {sentence}", err=True)
    violations = found.verify(loaded, adapter if loading["adapter"] else None)
    if as_json:
        rows = [
            {"weight": v.weight, "parameter": v.path, "not_zero": v.revived, "removed": v.removed}
            for v in violations
        ]
        print_json({"ok": not violations, "removed": found.removed, "violations": rows})
        sys.exit(NOT_SPARSE if violations else 0)
    if not violations:
        whole = whole_sparsity(loaded, WeightMap.of(loaded, adapter), found)
        click.echo(
            f"ok: all {found.removed:,} removed elements of {len(found)} weights are zero, "
            f"{whole:.1%} of the whole model"
        )
        return
    print_table(
        "Not zero where the mask removes",
        ["weight", "parameter", "elements", "of removed"],
        [[v.weight, v.path, f"{v.revived:,}", f"{v.removed:,}"] for v in violations],
    )
    sys.exit(NOT_SPARSE)


@masks.command(
    short_help="Compare two mask files.",
    examples=[
        "vlp masks diff masks.safetensors other.safetensors",
    ],
)
@click.argument("one", type=PATH)
@click.argument("other", type=PATH)
@json_option
def diff(one: Path, other: Path, as_json: bool) -> None:
    """Compare mask files ONE and OTHER of the same model, by modality."""
    from vlp_plugins.masks.compare import distances
    from vlp_plugins.masks.masks import Masks

    first, second = Masks.load(one), Masks.load(other)
    overlaps = first.compare(second)
    valued = [path for path, each in ((one, first), (other, second)) if each.new_values is not None]
    apart = distances(first, second) if len(valued) == 2 else {}  # where both keep an element
    if as_json:
        record = {
            name: {
                "elements": o.total,
                "differing": o.differing,
                "agreement": o.agreement,
                "kept_by_both": o.both,
                "kept_by_either": o.either,
                "new_weights_distance": apart.get(name),
            }
            for name, o in overlaps.items()
        }
        print_json({"modalities": record})
        return
    header = ["modality", "elements", "differing", "agreement", "kept by both / by either"]
    rows = {
        name: [name, f"{o.total:,}", f"{o.differing:,}", f"{o.agreement:.4%}", f"{o.iou:.4f}"]
        for name, o in overlaps.items()
    }
    header += ["new weights apart"] if apart else []
    for name, distance in apart.items():
        rows[name].append(f"{distance:.4%}")
    print_table("", header, list(rows.values()))
    if len(valued) == 1:
        say(f"only {valued[0]} brings new weights of what it keeps")


@masks.command(
    short_help="Keep what a mask file removes, to test a method.",
    examples=[
        "vlp masks invert masks.safetensors --out inverted.safetensors",
    ],
)
@_file
@written_options
def invert(file: Path, target: Path, overwrite: bool) -> None:
    """Make masks that keep what FILE removes: they should ruin a model, if FILE is any good."""
    from vlp_plugins.masks.masks import Masks

    found = Masks.load(file)
    inverted = found.invert()
    inverted.save(target, overwrite=overwrite)
    if found.new_values is not None:
        say(f"left out: {_new_weights(found)}", err=True)
    click.echo(f"{target}: sparsity {inverted.sparsity:.4%}")


@masks.command(
    "import",
    short_help="Read a mask file of the published code.",
    examples=[
        "vlp masks import published.pth model --out imported.safetensors",
    ],
)
@_file_and_model
@written_options
@model_options
def import_(file: Path, model: str, target: Path, overwrite: bool, **loading: Any) -> None:
    """Read a .pth FILE of masks for MODEL that the published MULTIFLOW code has written.

    No code in it runs. Its keys end in _pruning_mask.
    """
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.published_files import import_published
    from vlp_plugins.models.weights import WeightMap
    from vlp_plugins.runtime.files import check_new

    _check_order(file, model)
    check_new(target, overwrite=overwrite)
    loaded, adapter = load_model(model, **loading)
    found = import_published(file, WeightMap.of(loaded, adapter), adapter)
    found.save(target, overwrite=overwrite)
    click.echo(f"{target}: sparsity {found.sparsity:.4%}")


@masks.command(
    short_help="Write a mask file for the published code.",
    examples=[
        "vlp masks export masks.safetensors model --out published.pth",
    ],
)
@_file_and_model
@written_options
@model_options
def export(file: Path, model: str, target: Path, overwrite: bool, **loading: Any) -> None:
    """Write a mask FILE of MODEL as a .pth file that the published MULTIFLOW code reads."""
    from vlp_plugins.loading import load_model
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.masks.published_files import export_published
    from vlp_plugins.models.weights import WeightMap
    from vlp_plugins.runtime.files import check_new

    _check_order(file, model)
    check_new(target, overwrite=overwrite)
    found = Masks.load(file)
    loaded, adapter = load_model(model, **loading)
    export_published(found, target, WeightMap.of(loaded, adapter), adapter, overwrite=overwrite)
    click.echo(f"{target}: {len(found)} masks, sparsity {found.sparsity:.4%}")
    if found.new_values is not None:
        say(
            f"warning: left out {_new_weights(found)}: published files hold masks alone, under "
            "which the dense weights are another model; `vlp masks apply` writes a whole one",
            err=True,
        )


def _check_order(file: Path, model: str) -> None:
    """Says if the two were swapped: no file of masks, but a file for a model."""
    if not file.is_file() and Path(model).is_file():
        raise click.UsageError(f"{file} is not a file of masks: FILE comes first, then MODEL")


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _record(file: Path, found: Masks) -> dict[str, Any]:
    """A mask file as JSON has it; see docs/json.md."""
    m = found.manifest
    names = ("method", "parameters", "seed", "sparsity", "calibration", "adapter", "structure")
    return {
        "file": file,
        **{name: getattr(m, name) for name in (*names, "made_by", "created", "note")},
        "warnings": _doubts(file, found),
        "new_weights_bytes": None if found.new_values is None else found.values_bytes,
        **counts_record(_counts(found)),
    }


def _counts(found: Masks) -> dict[str, Count]:
    """By modality, in all, and of the whole model if the masks know how large it was."""
    from vlp_plugins.masks.manifest import Count

    counts, elements = found.counts(), found.manifest.model_elements
    whole = {} if elements is None else {"whole model": Count(elements - found.removed, elements)}
    return {**counts.by_modality, "all": counts.all, **whole}


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
