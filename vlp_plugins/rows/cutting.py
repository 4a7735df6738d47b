"""Where columns are cut: among processes, into parts, into groups of parts. Never in a block."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from vlp_plugins.rows.columns import Columns
from vlp_plugins.solvers.rows import part_bounds

PART = 1 << 26
"""Most elements of a part, unless a block is larger: 256 MiB of float32.

A part should hold enough blocks for many cores."""

_LEAST_WIDTH = 1 << 12

Cuts = tuple[int, ...]


def least_width(columns: Columns) -> int:
    """Columns of the narrowest part that must be possible: the largest block."""
    return min(columns.p, _LEAST_WIDTH) if columns.bounds is None else columns.widest


def shares_of(columns: Columns, processes: int) -> Cuts:
    """First column of every process, then p: about equal shares of whole blocks."""
    p, bounds = columns.p, columns.bounds
    ideal = [p * i // processes for i in range(processes + 1)]
    if bounds is None:
        return tuple(ideal)
    edges = [0]
    for wanted in ideal[1:-1]:
        index = bisect_left(bounds, wanted)
        near = min(bounds[max(index - 1, 0) : index + 1], key=lambda bound: abs(bound - wanted))
        edges.append(max(edges[-1], near))
    return (*edges, p)


def cuts_of(columns: Columns, n: int, edges: Cuts, elements: int) -> tuple[Cuts, ...]:
    """The parts of every process: first column of each, then the end of the last.

    Args:
        columns: of all processes.
        n: number of rows.
        edges: see `shares_of`.
        elements: most elements of a part that is more than one block.
    """
    found = []
    for start, stop in pairwise(edges):
        inner = None
        if columns.bounds is not None:
            first, last = bisect_left(columns.bounds, start), bisect_left(columns.bounds, stop)
            inner = [bound - start for bound in columns.bounds[first : last + 1]]
        cuts = part_bounds(n, stop - start, inner, elements) if start < stop else [0]
        found.append(tuple(start + cut for cut in dict.fromkeys(cuts)))
    return tuple(found)


def groups_of(cuts: tuple[Cuts, ...], columns: int) -> tuple[tuple[Cuts, ...], ...]:
    """Groups of neighbouring parts, by group and process.

    Args:
        cuts: the parts of every process.
        columns: the most of a group and process, at least those of the widest part.

    Returns:
        As many groups for every process; some may be empty (a single cut).
    """
    by_process = [_grouped(own, columns) for own in cuts]
    count = max(map(len, by_process))
    for groups in by_process:
        groups += [groups[-1][-1:]] * (count - len(groups))
    return tuple(zip(*by_process, strict=True))


def _grouped(cuts: Cuts, columns: int) -> list[Cuts]:
    groups = [[cuts[0]]]
    for start, stop in pairwise(cuts):
        if stop - groups[-1][0] > columns and len(groups[-1]) > 1:
            groups.append([start])
        groups[-1].append(stop)
    return [tuple(group) for group in groups]
