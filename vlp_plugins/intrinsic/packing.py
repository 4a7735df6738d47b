"""How many layers fit into the memory budget at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import text_of


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one use of a weight takes.

    Attributes:
        name: for messages.
        stream: in which it runs.
        held: its points, until its dimension is computed.
        work: beside all points, while that happens.
    """

    name: str
    stream: str
    held: int
    work: int


def fits(needs: Sequence[Need], budget: int) -> bool:
    """Whether these can be gathered in one pass."""
    work = max((need.work for need in needs), default=0)
    return sum(need.held for need in needs) + work <= budget


def pack(needs: Sequence[Need], budget: int) -> list[tuple[int, int]]:
    """The fewest passes, each over neighbours in the order of execution.

    Among those, every pass but the last ends as early as may be, or at the end of the stream it has
    begun: streams after its last layer need not run, and what is gathered in a stream that runs
    anyway leaves room in the later passes.

    Args:
        needs: in the order of execution.
        budget: bytes.

    Returns:
        By pass its first index and the one after its last.

    Raises:
        UnsupportedError: if one does not fit by itself.
    """
    for need in needs:
        if not fits([need], budget):
            raise UnsupportedError(
                f"the points of {need.name} take {text_of(need.held)} and the search for "
                f"neighbours {text_of(need.work)}, but the memory budget is {text_of(budget)}; use "
                "fewer samples (limit, --batches), keep points in bfloat16 (dtype='bfloat16', "
                "--points-dtype; half of it), or give "
                f"memory_budget={need.held + need.work} (--memory-budget) or more"
            )
    passes: list[tuple[int, int]] = []
    start = 0
    for stop in _earliest_ends(needs, budget):
        while stop < len(needs) and needs[stop].stream == needs[stop - 1].stream:
            if not fits(needs[start : stop + 1], budget):
                break
            stop += 1
        passes.append((start, stop))
        start = stop
    return passes


def _earliest_ends(needs: Sequence[Need], budget: int) -> list[int]:
    """Index after the last of every pass, if each leaves as much as can be left to those after."""
    ends = []
    start = len(needs)
    while start:
        ends.append(start)
        start -= 1
        while start and fits(needs[start - 1 : ends[-1]], budget):
            start -= 1
    return ends[::-1]
