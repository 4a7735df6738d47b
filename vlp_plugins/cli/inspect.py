"""`vlp inspect` and `vlp plugins`."""

from __future__ import annotations

import click

from vlp_plugins.cli.options import adapter_option
from vlp_plugins.cli.tables import print_table


@click.command()
def plugins() -> None:
    """Every plug-in: what it registered, or why it failed."""
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.models.registry import plugins_table

    rows = plugins_table(registry().plugins())
    print_table("", list(rows[0]) if rows else ["plug-in"], [list(row.values()) for row in rows])
    click.echo("id*NAME is method NAME with every layer's importance times its intrinsic dimension")


@click.command()
@click.argument("model")
@click.option("--weights", is_flag=True, help="One row per weight, with all its names.")
@adapter_option
def inspect(model: str, weights: bool, adapter: str | None) -> None:
    """What is pruned in MODEL, what is not and why, and what is tied.

    MODEL is a folder, a checkpoint file or a hub id. A folder with a config.json is enough, the
    weights need not be there.
    """
    from vlp_plugins.loading import load_structure
    from vlp_plugins.models.inspection import inspect_model

    found = inspect_model(*load_structure(model, adapter=adapter))
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
