"""The command as a function."""

from __future__ import annotations

from collections.abc import Callable

from click.testing import CliRunner, Result

from vlp_plugins.cli.program import main

Command = Callable[..., Result]


def command(*args: object, code: int = 0, columns: int = 400) -> Result:
    """Runs `vlp` with these arguments and checks its exit code; never a traceback.

    The terminal is wide, so that no sentence and no row is broken.
    """
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, [str(arg) for arg in args])
    text = f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), text
    assert result.exit_code == code, text
    return result
