"""The program around the commands: one line for every error, exit codes, how to resume."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from vlp_plugins.cli.help import Group
from vlp_plugins.cli.terminal import (
    Progress,
    data_progress,
    quiet_libraries,
    show_log,
    visible,
)
from vlp_plugins.runtime.errors import VlpError, is_out_of_memory
from vlp_plugins.runtime.version import __version__

MENDABLE = 2
"""Exit code of errors that the user can mend; 1 is the answer "no" of `vlp masks verify`."""
UNEXPECTED = 70
INTERRUPTED = 130
TERMINATED = 143
"""Exit code after SIGTERM, which ends a command as Ctrl-C does: what was done is kept."""
_REPEAT_AFTER = 0.5  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM: what `kill` and batch systems send."""


class Program(Group):
    """Prints errors on one line. With `VLP_TRACEBACK=1` they show where they come from."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs the command that the arguments name, and exits."""
        extra["standalone_mode"] = False
        try:
            with _interruptible():
                result = super().main(args, *rest, **extra)
            sys.exit(result)
        except SystemExit as error:
            if (place := _exit_caller(error)) is None:
                raise
            text = f"{place} ended the program by sys.exit({error.code!r}); nothing was written"
            click.echo(f"{_who()}error: {text} (a plug-in raises an error instead)", err=True)
            sys.exit(UNEXPECTED)
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
        ended = isinstance(error.__cause__, Terminated)
        return ("terminated", TERMINATED) if ended else ("interrupted", INTERRUPTED)
    code = MENDABLE
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "vlp"
        text = f"{error.format_message().rstrip('.')}; see {path} --help"
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, VlpError):
        text = str(error)
    elif is_out_of_memory(error):
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


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `KeyboardInterrupt`, and again if some library swallows it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, received = os.getpid(), list[type[KeyboardInterrupt]]()

    def stop(number: int, _frame: object) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if os.getpid() != process:  # a child that has inherited this
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(kind)
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, _REPEAT_AFTER, _REPEAT_AFTER)
        raise kind

    def again(_number: int, _frame: object) -> None:
        if not _is_handled(sys.exc_info()[1]):  # else it is on its way, saving what was done
            raise received[0]

    numbers = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        if received and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_handled(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is an interruption."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | click.Abort):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_caller(error: SystemExit) -> str | None:
    """Whose code called `sys.exit`; None for the commands themselves."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return None
    module = str(trace.tb_frame.f_globals.get("__name__"))
    if module.split(".")[0] == "click" or module.startswith(__package__ or "vlp_plugins.cli"):
        return None
    return f"{module}.{trace.tb_frame.f_code.co_qualname}"


def _who() -> str:
    """Which of several processes prints a line."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return f"process {os.environ.get('RANK', '?')} of {world}: " if world > 1 else ""


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=[
        "vlp prune --model model --data photos --sparsity 0.75 --out pruned",
        "vlp masks apply pruned/masks-0.75.safetensors model --out pruned-model",
    ],
)
@click.version_option(__version__, prog_name="vlp")
def main() -> None:
    """Prune vision-language models, and others, by the methods made for them.

    Usual order: inspect, compare, prune, evaluate, masks apply, finetune. Every command has a
    --help with examples. Names are completed by the Tab key after
    eval "$(_VLP_COMPLETE=bash_source vlp)"; for other shells, zsh_source and fish_source.
    """
    quiet_libraries()
    show_log()


@contextmanager
def explained_interruption(
    command: str, is_left: Callable[[], object], *, shown: bool
) -> Iterator[None]:
    """Says after Ctrl-C or SIGTERM, if this process is `shown`, how to resume what `is_left`."""
    try:
        yield
    except KeyboardInterrupt as error:
        if shown:
            click.echo(_how_to_resume(command) if is_left() else _NOTHING, err=True)
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)


@contextmanager
def distributed_run(
    device: str | None,
    command: str,
    is_left: Callable[[], object],
    *,
    what: str = "reading data",
    units: str = "batches",
) -> Iterator[tuple[Progress, bool]]:
    """The process group of a run, its progress bar, and how to resume it.

    Yields:
        What shows the progress, and whether this process has rank 0 and prints.
    """
    from vlp_plugins.runtime.distributed import process_group, rank_and_size

    with process_group(device):
        rank_zero = rank_and_size()[0] == 0
        with (
            explained_interruption(command, is_left, shown=rank_zero),
            data_progress(shown=rank_zero, what=what, units=units) as progress,
        ):
            yield progress, rank_zero


_NOTHING = "interrupted; nothing was written"


def _how_to_resume(command: str) -> str:
    from vlp_plugins.runtime.distributed import rank_and_size

    line = f"{command} --resume"
    if (world := rank_and_size()[1]) > 1:  # a checkpoint is of as many processes as wrote it
        line = line.replace("vlp", f"torchrun --nproc-per-node {world} -m vlp_plugins", 1)
    return f"interrupted; to resume: {line}"


def command_line(context: click.Context) -> str:
    """The command line of a run as a user would write it, without `--resume`."""
    words = ["vlp", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if (
            name == "resume"
            or not parameter.expose_value
            or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE
        ):
            continue
        words += _words_of(parameter, context.params[name])
    return shlex.join(words)


def _words_of(parameter: click.Parameter, value: Any) -> list[str]:
    values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
    if isinstance(parameter, click.Argument):
        return values
    if isinstance(value, bool):
        return [max(parameter.opts if value else parameter.secondary_opts, key=len)]
    return [max(parameter.opts, key=len), *values]
