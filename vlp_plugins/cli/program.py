"""The program around the commands: one line for every error, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from vlp_plugins import __version__
from vlp_plugins.cli.quiet import quiet_libraries, show_log
from vlp_plugins.cli.tables import visible
from vlp_plugins.errors import VlpError

MENDABLE = 2
"""Exit code of errors that the user can mend; 1 is the answer "no" of `vlp masks verify`."""
UNEXPECTED = 70
INTERRUPTED = 130
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Program(click.Group):
    """Prints errors on one line. With `VLP_TRACEBACK=1` they show where they come from."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs the command that the arguments name, and exits."""
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(args, *rest, **extra))
        except Exception as error:  # click.Abort, which stands for Ctrl-C, among them
            if os.environ.get("VLP_TRACEBACK"):
                raise
            text, code = explain(error)
            click.echo(text, err=True)
            sys.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """What to print about an error, one line of it if a person can do something, and the code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message(), MENDABLE
    if isinstance(error, click.Abort):
        return "interrupted", INTERRUPTED
    code = MENDABLE
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "vlp"
        text = f"{error.format_message().rstrip('.')}; see {path} --help"
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, VlpError):
        text = str(error)
    elif _is_out_of_memory(error):
        text = (
            "out of memory; give a smaller --batch-size, --dtype bfloat16 or another --device "
            "(`vlp plan` says what a run needs)"
        )
    elif isinstance(error, OSError):
        text = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    else:
        text = (
            f"unexpected {type(error).__name__}: {error} (VLP_TRACEBACK=1 shows where; "
            "please report it)"
        )
        code = UNEXPECTED
    return f"{_who()}error: {visible(' '.join(text.split()))}", code


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        part in str(error).lower() for part in _OUT_OF_MEMORY
    )


def _who() -> str:
    """Which of several processes speaks."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return f"process {os.environ.get('RANK', '?')} of {world}: " if world > 1 else ""


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlp")
def main() -> None:
    """Pruning methods made for vision-language models."""
    quiet_libraries()
    show_log()
