"""`vlp inspect` and `vlp plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import adapter_option, json_option, option
from vlp_plugins.cli.terminal import print_json, print_lines, print_table, say

if TYPE_CHECKING:
    from vlp_plugins.models.inspection import Inspection


@click.command(
    cls=Command,
    short_help="List plug-ins, and why one failed.",
    examples=["vlp plugins"],
)
@json_option
def plugins(as_json: bool) -> None:
    """List the installed plug-ins: what each adds, or why it failed, and which hosts are there.

    VLP_PLUGINS_BLOCK=NAME,NAME in the environment leaves plug-ins out; `all` leaves out all but
    those of this project.
    """
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.models.registry import plugins_table

    reports, hosts = registry().plugins(), registry().host_failures()
    if as_json:
        names = ("name", "distribution", "version", "status", "registered", "error", "notes")
        listed = [{n: getattr(each, n) for n in names} for each in reports]
        print_json(
            {"plugins": listed, "hosts": [{"name": n, "error": e} for n, e in hosts.items()]}
        )
        return
    rows = plugins_table(reports)
    cells = [list(row.values()) for row in rows]
    print_table("", list(rows[0]) if rows else ["plug-in"], cells, most=80)
    say()
    print_lines(f"host {name}: {error or 'installed'}" for name, error in hosts.items())
    say("id*NAME is method NAME with every layer's importance times its intrinsic dimension")


@click.command(
    cls=Command,
    short_help="Show what can be pruned in a model, and what not.",
    examples=["vlp inspect model", "vlp inspect model --weights"],
)
@click.argument("model")
@option(
    "Output", "--weights", is_flag=True,
    help="Also list every weight, with its shape and all its names.",
)  # fmt: skip
@adapter_option
@json_option
def inspect(model: str, weights: bool, adapter: str | None, as_json: bool) -> None:
    """Show which weights of MODEL can be pruned, which not and why, and which are shared.

    MODEL is a folder, a checkpoint file or an id of the Hugging Face hub. A folder with a
    config.json is enough; the weights need not be there.
    """
    from vlp_plugins.loading import describe_file, load_structure
    from vlp_plugins.models.inspection import inspect_model

    file = describe_file(model)
    if file is not None and not as_json:  # said even of a file that cannot be loaded
        say(f"{model}: {file}")
    found = inspect_model(*load_structure(model, adapter=adapter))
    if as_json:
        print_json({"file": file} | _record(found))
        return
    say(f"{found.model}, adapter {found.adapter!r}, structure {found.weights.structure}")
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


def _record(found: Inspection) -> dict[str, Any]:
    """A model as JSON has it; see docs/json.md."""
    return {
        "model": found.model,
        "adapter": found.adapter,
        "structure": found.weights.structure,
        "parameters": found.parameters,
        "prunable": found.prunable,
        "groups": [
            {
                "modality": g.modality,
                "layers": g.layers,
                "weights": g.tensors,
                "shared": g.shared,
                "elements": g.elements,
            }
            for g in found.groups
        ],
        "not_pruned": [
            {
                "reason": e.reason,
                "parameters": e.tensors,
                "elements": e.elements,
                "example": e.example,
                "by_design": e.by_design,
            }
            for e in found.excluded
        ],
        "weights": [
            {
                "name": w.name,
                "modality": w.modality,
                "depth": w.depth,
                "shape": list(w.shape),
                "parameters": w.aliases,
            }
            for w in found.weights.values()
        ],
    }
