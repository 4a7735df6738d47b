"""`vlp init`: a recipe with every key explained, to be filled in."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlp_plugins.cli.help import HEADINGS, Command, Option
from vlp_plugins.cli.options import PATH, option, overwrite_option, recipe_options

if TYPE_CHECKING:
    from vlp_plugins.methods.description import MethodDescription

_WIDTH = 100
_SPARSITY = (0.75,)
_OUT = "pruned"


@click.command(
    cls=Command,
    short_help="Write a recipe with every key explained.",
    examples=[
        "vlp init --model model --data photos --out my.yaml",
        "vlp init --method chita --out chita.yaml",
    ],
)
@option("Model", "--model", metavar="PATH_OR_ID", help="Model to prune, as of `vlp prune`.")
@option("Data", "--data", metavar="PATH_OR_ID", help="Calibration data, as of `vlp prune`.")
@option(
    "Method", "--method", metavar="NAME", default="multiflow",
    help="Pruning method; the recipe explains its settings, too.",
)  # fmt: skip
@option(
    "Output", "--out", "target", type=PATH, metavar="FILE", default="recipe.yaml",
    help="Name of the recipe.",
)  # fmt: skip
@overwrite_option
def init(model: str | None, data: str | None, method: str, target: Path, overwrite: bool) -> None:
    """Write a recipe for `vlp prune` with all its keys, each explained and with its default."""
    from vlp_plugins.methods.description import describe_method
    from vlp_plugins.models.discovery import registry
    from vlp_plugins.runtime.files import write_text
    from vlp_plugins.scoring.factors import GUIDED

    described = describe_method(registry(), method.removeprefix(GUIDED))
    given = {"model": model, "method": method, "sparsity": _SPARSITY, "out": _OUT}
    text = "".join(
        f"{line}\n" for line in _lines({**given, "data.source": data}, described, target.name)
    )
    write_text(target, text, overwrite=overwrite)
    click.echo(f"written: {target}; to run it: vlp prune {target}")


def _lines(given: dict[str, Any], method: MethodDescription, name: str) -> Iterator[str]:
    """The recipe: keys that are given, and the others as comments that show the default."""
    from vlp_plugins.jobs.recipes import LAMBDA, OPTIONS, Recipe, value_at

    yield f"# A recipe. To run it: vlp prune {name}"
    yield "# Keys after a # have their default; remove the # to change them."
    prune = recipe_options(Command("prune", params=[]))
    helps = {each.opts[0]: each for each in prune.params if isinstance(each, Option)}
    settings = {each.name: each for each in method.parameters}
    keys = {key: helps[name] for key, name in OPTIONS.items() if key != "parameters"}
    if LAMBDA not in settings:
        del keys[f"parameters.{LAMBDA}"]
    for heading in HEADINGS:
        inside = {  # those of a section stay together
            key: each
            for key, each in keys.items()
            if heading == ("Data" if key.startswith("data.") else each.heading)
        }
        if not inside:
            continue
        yield f"\n# --- {heading} ---"
        for key, each in inside.items():
            section, _, inner = key.rpartition(".")
            if key == "data.source":
                yield "\ndata:"
            indent = "  " if section == "data" else ""
            default = f" Default: {each.standard}." if each.standard else ""
            # Budgets of modalities are written as a mapping here.
            text = str(each.help).replace("vision=0.5,text=0.8", "{vision: 0.5, text: 0.8}")
            yield from _comment(f"{text}{default}", indent)
            standard = (
                value_at(Recipe(), key) if section != "parameters" else settings[LAMBDA].default
            )
            mark = "" if key in given else "#"
            yield f"{indent}{mark}{inner}:{_value(given.get(key, standard))}"
        if heading == "Method" and settings:
            yield from _settings(method)


def _settings(method: MethodDescription) -> Iterator[str]:
    from vlp_plugins.jobs.recipes import LAMBDA

    yield f"\n# Settings of {method.name}; see `vlp methods {method.name}`."
    yield "parameters:"
    for each in method.parameters:
        if each.name != LAMBDA:
            yield from _comment(each.help or "Not explained by its author.", "  ")
            yield f"  #{each.name}:{_value(each.default)}"


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return ["", *textwrap.wrap(text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix)]


def _value(value: Any) -> str:
    """A value as YAML has it, with a space before it; nothing for none."""
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        import yaml

        plain = not set(value) & set("#:{}[],&!|>'\"%@`") and yaml.safe_load(value) == value
        return f" {value}" if plain else f" {json.dumps(value)}"
    return f" {json.dumps(value, default=str)}"
