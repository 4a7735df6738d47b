"""`vlp inspect` and `vlp plugins`."""

from __future__ import annotations

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import adapter_option, option
from vlp_plugins.cli.tables import print_table, say


@click.command(
    cls=Command,
    short_help="List plug-ins, and why one failed.",
    examples=["vlp plugins"],
)
def plugins() -> None:
    """List the installed plug-ins: what each adds, or why it failed.

    VLP_PLUGINS_BLOCK=NAME,NAME in the environment leaves plug-ins out; `all` leaves out all but
    those of this project.
    """
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.models.registry import plugins_table

    rows = plugins_table(registry().plugins())
    print_table("", list(rows[0]) if rows else ["plug-in"], [list(row.values()) for row in rows])
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
def inspect(model: str, weights: bool, adapter: str | None) -> None:
    """Show which weights of MODEL can be pruned, which not and why, and which are shared.

    MODEL is a folder, a checkpoint file or an id of the Hugging Face hub. A folder with a
    config.json is enough; the weights need not be there.
    """
    from vlp_plugins.loading import load_structure
    from vlp_plugins.models.inspection import inspect_model

    found = inspect_model(*load_structure(model, adapter=adapter))
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
