"""What all commands have in common: `--help` with examples and headings, `--quiet`, `--verbose`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click

from vlp_plugins.cli.terminal import VERBOSITY, show_log

HEADINGS = ("Model", "Data", "Task", "Method", "Training", "Measuring", "Output", "Computing")
"""Of options, in the order of `--help`; options without one come last."""

_NUMBER = re.compile(r"-\.?\d")
_RECIPE = (".yaml", ".yml")


class Option(click.Option):
    """An option under a heading.

    Attributes:
        heading: one of `HEADINGS`.
        standard: what is taken if it is left out, in words, where click does not know it.
        several: whether values may follow each other: `--sparsity 0.63 0.75 0.9`.
    """

    def __init__(
        self,
        *args: Any,
        heading: str = "",
        standard: str = "",
        several: bool = False,
        **others: Any,
    ) -> None:
        others.setdefault("show_default", not standard)
        super().__init__(*args, **others | {"multiple": several})
        self.heading, self.standard, self.several = heading, standard, several

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets after the help: the default, in words if it has them."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)  # its help says it where it matters
        return extra | {"default": self.standard} if self.standard else extra


def _set_verbosity(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        context.meta[VERBOSITY] = -1 if option.name == "quiet" else 1
        show_log()


class _Readable:
    """A command whose help has examples and headings; for classes of click.

    Attributes:
        examples: command lines that work, with the names of files that a user would have.
    """

    params: list[click.Parameter]

    def __init__(self, *args: Any, examples: Sequence[str] = (), **others: Any) -> None:
        super().__init__(*args, **others)
        self.examples = tuple(examples)
        common: dict[str, Any] = {
            "is_flag": True,
            "expose_value": False,
            "callback": _set_verbosity,
        }
        self.params += [
            Option(["-q", "--quiet"], help="Print results and errors only.", **common),
            Option(["-v", "--verbose"], help="Also print each step of the work.", **common),
        ]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, those without a heading last."""
        found: list[click.Parameter] = super().get_params(ctx)  # type: ignore[misc]
        order = {heading: index for index, heading in enumerate((*HEADINGS, ""))}
        return sorted(found, key=lambda each: order[getattr(each, "heading", "")])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes examples, then options by heading, then the commands of a group."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    for line in example.splitlines():
                        formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                title = getattr(parameter, "heading", "") or "General"
                rows.setdefault(f"{title} options", []).append(record)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


def _names_recipe(arg: str) -> bool:
    """Whether it can only be RECIPE: a file, or a packaged one such as paper/multiflow-blip."""
    return arg.endswith(_RECIPE) or ("/" in arg and "=" not in arg)


class Command(_Readable, click.Command):
    """A command; options of several values take them one after the other."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats such an option before each of its values; a recipe is never one of them."""
        options = (each for each in self.params if isinstance(each, Option) and each.several)
        several = {name for each in options for name in each.opts}
        spread: list[str] = []
        current = ""
        waiting = False  # for the first value, which may look like an option
        for arg in args:
            option, sign, _ = arg.partition("=")
            is_option = arg.startswith("-") and not _NUMBER.match(arg)
            if waiting and is_option and not ctx.resilient_parsing:
                break  # else the next option would hide that the value is missing
            if option in several:
                current, waiting = option, not sign
                if sign:
                    spread.append(arg)
            elif is_option or not current or (_names_recipe(arg) and not waiting):
                current = ""
                spread.append(arg)
            else:
                spread.append(f"{current}={arg}")
                waiting = False
        if waiting and not ctx.resilient_parsing:
            raise click.BadOptionUsage(current, f"Option {current!r} requires a value.", ctx)
        return super().parse_args(ctx, spread)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it, unless it would delete what it reads; a recipe was read before."""
        given = {name: value for name, value in ctx.params.items() if name != "recipe"}
        out = given.pop("target", None) or given.pop("out", None)
        if given.get("overwrite") and out is not None and Path(out).is_dir():
            from vlp_plugins.runtime.files import check_outside

            values = (v if isinstance(v, (list, tuple)) else [v] for v in given.values())
            check_outside(out, chain.from_iterable(values))
        return super().invoke(ctx)


class Group(_Readable, click.Group):
    """Commands under one name."""

    command_class = Command
