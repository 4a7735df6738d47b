"""`vlp methods`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import Command
from vlp_plugins.cli.options import json_option
from vlp_plugins.cli.terminal import print_json, print_lines, print_table, say

if TYPE_CHECKING:
    from vlp_plugins.methods.description import MethodDescription
    from vlp_plugins.models.registry import Kind

_NOTES = (
    "needs: data are images with captions; gradients (with data) and training (with both) are of "
    "the loss that the model was pre-trained with. No method needs labels.",
    "cost: time in forward passes over the calibration data, where forward and backward together "
    "count as 3; `vlp plan` says it in seconds.",
    "weights: whether the weights that stay keep their values or get new ones.",
    "`vlp methods NAME` shows one method with its settings. id*NAME is the method NAME with the "
    "importance of each layer multiplied by its intrinsic dimension.",
)

_PARTS: Mapping[Kind, str] = {
    "allocations": "Allocations: how much each weight loses (--allocation NAME)",
    "token_selections": "Token selections: which tokens count, block by block",
}


@click.command(
    cls=Command,
    short_help="List pruning methods: what each does and needs.",
    examples=["vlp methods", "vlp methods multiflow"],
)
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the pruning methods: what each does, what it needs, what it costs.

    Then the allocations and the token selections that methods take. With NAME one of the methods,
    with its settings (for --parameter) and those of its paper. What plug-ins bring is there too.
    """
    from vlp_plugins.methods.description import describe_method, describe_methods, describe_parts
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.scoring.factors import GUIDED

    if name is not None:
        found = describe_method(registry(), name.removeprefix(GUIDED))
        if as_json:
            print_json(_record(found))
        else:
            _show(found)
        return
    rows = list(map(_record, describe_methods(registry())))
    parts = {kind: describe_parts(registry(), kind) for kind in _PARTS}
    if as_json:
        described: dict[str, Any] = {
            kind: [{**asdict(part), "paper": part.paper or None} for part in each]
            for kind, each in parts.items()
        }
        print_json({"methods": rows, **described})
        return
    print_table(
        "",
        ["method", "what it does", "needs", "cost", "weights"],
        [
            [
                row["name"],
                row["summary"],
                row["needs"][-1] if row["needs"] else "nothing",
                row["cost"],
                "new" if row["new_weights"] else "kept",
            ]
            for row in rows
        ],
        names=True,
    )
    for kind, each in parts.items():
        print_table(
            _PARTS[kind],
            ["name", "what it does"],
            [[part.name, part.summary] for part in each],
            names=True,
        )
    say()
    print_lines(_NOTES)


def _record(found: MethodDescription) -> dict[str, Any]:
    """A method as JSON has it; see docs/json.md."""
    method = found.method
    return {
        "name": found.name,
        "distribution": found.distribution,
        "summary": found.summary,
        "details": found.details,
        "paper": found.paper or None,
        "needs": found.needs,
        "cost": "unknown" if method is None else method.relative_cost,
        "new_weights": method is not None and method.changes_weights,
        "allocation": None if method is None else method.allocation.name,
        "parameters": [
            {"name": p.name, "required": p.required, "default": p.default, "help": p.help}
            for p in found.parameters
        ],
        "recipes": _recipes(found.name),
    }


def _recipes(method: str) -> list[dict[str, Any]]:
    """The packaged recipes of a method: the settings of papers."""
    from vlp_plugins.jobs.recipes import load_recipe, packaged_recipes, sparsity_text

    names = [name for name in packaged_recipes() if name.startswith("paper/")]
    recipes = {name: load_recipe(name) for name in names if "/finetune-" not in name}
    return [
        {
            "name": name,
            "sparsity": list(map(sparsity_text, recipe.sparsity)),
            "batches": recipe.data.batches,
            "batch_size": recipe.data.batch_size,
            "parameters": recipe.parameters,
        }
        for name, recipe in recipes.items()
        if recipe.method == method
    ]


def _show(found: MethodDescription) -> None:
    record = _record(found)
    click.secho(found.name, bold=True)
    summary = [f"{found.summary}."] if found.summary else []
    for paragraph in (*summary, *found.details):
        say(paragraph, indent="")
        say()
    print_lines(
        [
            f"paper: {found.paper or 'none'}",
            f"from: {found.distribution}",
            f"needs: {', '.join(found.needs) or 'nothing but the model'}",
            f"cost: {record['cost']} (forward passes over the data; forward and backward are 3)",
            f"weights that stay: {'get new values' if record['new_weights'] else 'are kept'}",
            f"allocation: {record['allocation'] or 'unknown'}",
        ]
    )
    if found.parameters:
        print_table(
            "Settings (--parameter NAME=VALUE)",
            ["name", "default", "what it is"],
            [
                [p.name, "required" if p.required else _text(p.default), p.help]
                for p in found.parameters
            ],
        )
    if record["recipes"]:
        print_table(
            "Settings of papers (vlp prune NAME)",
            ["name", "sparsity", "batches", "settings"],
            [
                [
                    recipe["name"],
                    " ".join(recipe["sparsity"]),
                    f"{recipe['batches'] or 'all'} of {recipe['batch_size']}",
                    ", ".join(f"{k}={_text(v)}" for k, v in recipe["parameters"].items()),
                ]
                for recipe in record["recipes"]
            ],
        )


def _text(value: Any) -> str:
    """A value as it is written in a recipe."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
