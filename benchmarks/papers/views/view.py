"""What a view is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.papers.findings import Found

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rendered:
    """A table that can be written.

    Attributes:
        lines: Markdown, below the title and what `rendering` says first.
        figure: its plot; None if it has none.
    """

    lines: Sequence[str]
    figure: Figure | None = None


View = Callable[[Found], Rendered]
"""What a `Table` may have; it reads `Found`, and may read other files beside `found.folder`."""
