"""Files of figures: what is there is used only if it was made with the settings of now."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlp_plugins.runtime.errors import OutputError


class Kept(Protocol):
    """A cell: its name, and what its file says."""

    @property
    def name(self) -> str: ...

    def content(self, out: Path) -> Mapping[str, Any] | None: ...


def read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a file says; None if there is none.

    Args:
        path: of the file.
        identity: what decides its figures; the file has the same.

    Raises:
        OutputError: if the file was made with other settings, or is no JSON.
    """
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}); delete it") from error
    if wrong := [key for key, value in identity.items() if found.get(key) != value]:
        raise OutputError(
            f"{path} was made with other settings ({', '.join(wrong)}); move it away, or give "
            "another --cells"
        )
    return found


def listed(cells: Sequence[Kept], out: Path) -> list[str]:
    """A line for each cell: `done`, `missing`, or `stale` (of other settings, or damaged)."""
    return [f"{_state(cell, out):8}{cell.name}" for cell in cells]


def counted(name: str, cells: Sequence[Kept], out: Path) -> str:
    """A line for a table: how many of its cells are in each state."""
    states = Counter(_state(cell, out) for cell in cells)
    counts = (f"{states[state]:5} {state}" for state in ("done", "missing", "stale"))
    return f"{name:9}{''.join(counts)}"


def _state(cell: Kept, out: Path) -> str:
    try:
        return "missing" if cell.content(out) is None else "done"
    except OutputError:
        return "stale"
