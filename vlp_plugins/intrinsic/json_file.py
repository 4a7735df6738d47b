"""The files of this package: JSON that says what it is, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_plugins.artifacts import made_by, versions
from vlp_plugins.atomic import write_text
from vlp_plugins.errors import StatisticsError, first_line

SCHEMA = 1
"""Version of the format; a change that old code cannot read adds 1."""


def write(
    path: str | os.PathLike[str], kind: str, content: Mapping[str, Any], *, state: bool = False
) -> None:
    """Writes a file; one that is there is replaced.

    Args:
        path: the file.
        kind: what it holds.
        content: what JSON can say.
        state: replace a file of this kind and nothing else; a link is not followed.

    Raises:
        OutputError: if it cannot be written.
    """
    header = {"kind": kind, "schema": SCHEMA, "made_by": made_by(), "versions": versions()}
    text = json.dumps({**header, **content}, indent=1, allow_nan=False)
    own = (lambda there: _is_of(there, kind)) if state else None
    write_text(path, text + "\n", overwrite=True, own=own)


def read(path: str | os.PathLike[str], kind: str, remedy: str) -> dict[str, Any]:
    """Reads what `write` wrote.

    Args:
        path: the file.
        kind: what it should be.
        remedy: what the user should do if it is missing or damaged.

    Raises:
        StatisticsError: if it is missing, damaged, of another kind or too new.
    """
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(f"{path} is no file; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"{path} is damaged, truncated or no JSON ({type(error).__name__}: "
            f"{first_line(error)}); {remedy}"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise StatisticsError(f"{path} holds {found!r}, not {kind!r}; {remedy}")
    schema = content.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise StatisticsError(f"{path} is damaged (schema {schema!r}); {remedy}")
    if schema > SCHEMA:
        raise StatisticsError(
            f"{path} has format {schema}, newer than the {SCHEMA} that this version reads; it was "
            f"made by {content.get('made_by')}: upgrade vlp-plugins"
        )
    return content


def _is_of(path: Path, kind: str) -> bool:
    """True for a file that `write` begins like this, whether damaged or not."""
    begin = json.dumps({"kind": kind}, indent=1).removesuffix("\n}")
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(begin)) == begin
