"""Writes what the pages of the site take from the code, as Markdown, to `build/docs/`.

`make docs` runs it before the site is built: commands from click, keys of recipes from the classes
that hold them, models from the adapters that claim them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import click
import torch
import transformers.models

import vlp_adapters
import vlp_plugins.extend
from vlp_plugins.cli.program import main
from vlp_plugins.jobs.finetune import FinetuneRecipe
from vlp_plugins.jobs.recipes import DataRecipe, Recipe
from vlp_plugins.jobs.tasks import able_tasks
from vlp_plugins.methods.description import describe_methods, docstring_entries
from vlp_plugins.models.discovery import registry
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings

PARTS = Path(__file__).parents[1] / "build" / "docs"
WIDTH = 80


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def commands(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """Headings and `--help` of a command and of those below it."""
    context = command.make_context(
        name.split()[-1], [], parent, resilient_parsing=True, terminal_width=WIDTH
    )
    yield f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            inner = command.get_command(context, each)
            assert inner is not None
            yield from commands(inner, f"{name} {each}", context)


def keys(kind: type, command: str, prefix: str = "", without: Sequence[str] = ()) -> str:
    """The keys that a class keeps, as the options of a command explain them."""
    options = {each.name: each for each in main.commands[command].params}
    context = click.Context(main.commands[command])
    rows = []
    for each in fields(kind):
        if each.name in without:
            continue
        option = options.get(OPTIONS.get(prefix + each.name, each.name))
        if option is None:  # a key without an option
            meaning, default = said_of(kind, each.name), f"`{each.default}`"
        else:
            text = (option.get_help_record(context) or ("", ""))[1]
            meaning, _, default = text.partition("  [")
            default = default.rstrip("]").removeprefix("default: ")
        rows.append([f"`{prefix}{each.name}`", cell(meaning), default])
    return table(["key", "meaning", "default"], rows)


OPTIONS = {"data.source": "data", "data.seed": "shuffle_seed", "parameters": "parameter"}


def said_of(kind: type, name: str) -> str:
    """What the docstring of a class says of an attribute."""
    text = docstring_entries(inspect.getdoc(kind) or "")[name]
    return text[0].upper() + text[1:]


def model_classes() -> Iterator[type[torch.nn.Module]]:
    """The classes of transformers, and ours, among which adapters claim some."""
    places = [
        (name, attribute)
        for name in (each.name for each in iter_modules(vlp_adapters.__path__, "vlp_adapters."))
        for attribute in getattr(import_module(name), "__all__", ())
    ]
    for family in iter_modules(transformers.models.__path__):
        if not re.search("blip|clip|siglip|vit|dino", family.name):
            continue
        folder = Path(transformers.models.__path__[0], family.name)
        for name in (f"{family.name}.{each.stem}" for each in folder.glob("modeling_*.py")):
            module = f"transformers.models.{name}"
            places += [(module, attribute) for attribute in import_module(module).__all__]
    for module, attribute in places:
        value = getattr(import_module(module), attribute)
        if inspect.isclass(value) and issubclass(value, torch.nn.Module):
            yield value


def models() -> str:
    """One row for each class that an adapter claims."""
    found = registry()
    adapters = {name: found.adapter(name) for name in found.adapter_names()}
    adapters = {name: adapter for name, adapter in adapters.items() if not adapter.general}
    claimed: dict[str, set[str]] = {name: set() for name in adapters}
    for kind in model_classes():
        blank: Any = kind.__new__(kind)
        for name, adapter in adapters.items():
            if adapter.claims(blank):
                claimed[name].add(kind.__name__)
    rows = []
    for name, adapter in adapters.items():
        classes = ", ".join(f"`{each}`" for each in sorted(claimed[name]))
        rows.append([f"`{name}`", classes, ", ".join(able_tasks(adapter))])
    rows.append(["`transformers`", "every other model of transformers, see below", "none yet"])
    return table(["adapter", "classes", "tasks that can be measured"], rows)


def families() -> str:
    """One row for each kind of families that pass the tests."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "contract"))
    table_of: Any = import_module("families")
    kinds: dict[str, list[str]] = {}
    for name, family in table_of.FAMILIES.items():
        kinds.setdefault(family.kind, []).append(f"`{name}`")
    passed = table(["kind", "families"], [[kind, ", ".join(of)] for kind, of in kinds.items()])
    videos = ", ".join(f"`{name}`" for name in table_of.VIDEOS)
    return f"{passed}\nWith videos too: {videos}.\n"


def methods() -> str:
    """A section for each registered method."""
    sections = []
    for found in describe_methods(registry()):
        method = found.method
        assert method is not None, found.name
        facts = [
            f"{found.summary}.",
            *found.details,
            f"*Paper:* {found.paper}." if found.paper else "",
            f"*Needs:* {', '.join(found.needs) or 'nothing but the model'}. "
            f"*Cost:* {method.relative_cost}. "
            f"*Weights that stay:* {'get new values' if method.changes_weights else 'are kept'}. "
            f"*Allocation:* {method.allocation.name}.",
        ]
        rows = [
            [
                f"`{each.name}`",
                cell(each.help),
                "required" if each.required else f"`{each.default}`",
            ]
            for each in found.parameters
        ]
        if rows:
            facts.append(table(["setting", "meaning", "default"], rows))
        sections.append(f"## {found.name}\n\n" + "\n\n".join(filter(None, facts)) + "\n")
    return "\n".join(sections)


def cell(text: str) -> str:
    """A text in a cell of a table, with no mark-up but code."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").split())


def public_names(facade: ModuleType) -> str:
    """What mkdocstrings describes: each public name at its home, functions first."""
    found = {name: getattr(facade, name) for name in facade.__all__}
    order = sorted(found, key=lambda name: inspect.isclass(found[name]))
    return "\n".join(
        f"::: {found[name].__module__}.{name}\n"
        for name in order
        if inspect.isclass(found[name]) or inspect.isfunction(found[name])
    )


def write(name: str, text: str) -> None:
    """Writes one part."""
    PARTS.mkdir(parents=True, exist_ok=True)
    (PARTS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write("commands.md", "\n".join(commands(main, "vlp", None)))
    write("recipe.md", keys(Recipe, "prune", without=["data"]))
    write("recipe-data.md", keys(DataRecipe, "prune", "data."))
    write("finetune-recipe.md", keys(FinetuneRecipe, "finetune", without=["settings"]))
    write("finetune-settings.md", keys(FinetuneSettings, "finetune"))
    write("models.md", models())
    write("families.md", families())
    write("methods.md", methods())
    write("api.md", public_names(vlp_plugins))
    write("api-extend.md", public_names(vlp_plugins.extend))
