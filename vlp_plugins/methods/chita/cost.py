"""What a run of CHITA or CHITA++ will need, estimated before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlp_plugins.calibration.loss import bytes_of_state
from vlp_plugins.methods.chita.lambdas import GRID
from vlp_plugins.methods.chita.pruner import groups_of_weights
from vlp_plugins.methods.chita.rows.plan import Columns, plan_rows
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.setup import check_enough
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.solve import Effort, solve
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.schedules import levels_of

_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class SolverTime:
    """Seconds of one solve, a straight line over the number of columns.

    Attributes:
        fixed: seconds that do not depend on the number of columns.
        per_column: seconds.
    """

    fixed: float
    per_column: float

    @classmethod
    def measured(
        cls,
        effort: Effort,
        n: int,
        block_size: int | None,
        first_order: float,
        density: float,
        device: torch.device,
    ) -> SolverTime:
        """Solves random problems of about two and four megabytes, or of one and two blocks.

        Args:
            effort: of the solver.
            n: number of rows.
            block_size: columns of a block; None for the full problem.
            first_order: weight of the first-order term.
            density: fraction kept.
            device: of the rows.
        """
        block = block_size or 1
        small = max(1, _ELEMENTS // n // block) * block
        times = []
        for p in (small, small, 2 * small):  # the first warms up
            draw = torch.Generator().manual_seed(0)
            bounds = None if block_size is None else tuple(range(0, p + 1, block))
            rows = MemoryRows(torch.randn(n, p, generator=draw).to(device), bounds)
            weights = torch.randn(p, generator=draw).to(device)
            problem = Problem(weights, rows, 1.0, int(density * p), first_order, bounds)
            times.append(_seconds(problem, effort))
        _, one, two = times
        slope = max(two - one, two / 4) / small
        return cls(max(0.0, two - slope * 2 * small), slope)

    def seconds(self, p: int) -> float:
        """Of a problem with p columns."""
        return self.fixed + self.per_column * p


def _seconds(problem: Problem, effort: Effort) -> float:
    start = time.perf_counter()
    solve(problem, effort)
    return time.perf_counter() - start


_SOLVES_AROUND = 7
"""Three around the guess, two more where it was a decade off, and half a decade to both sides."""
_SOLVES_NEARBY = 5
"""In later rounds, around the lambda of the round before."""
_PAPER_ROWS = 500
_SWEEPS = {"published": 2, "fast": 6, "best": 27}
"""The most sweeps over the rows that one solve of the full problem takes."""
_VECTORS = 8
"""Of p float32 numbers: the weights, the result, the best so far, and what a solver works on."""
_PART_COPIES = 4
"""Of a part of the rows, in float32, while a solver works on it."""
_DISK_RATE = 10**9
"""Bytes per second."""


def cost_of(
    context: Context,
    settings: Settings,
    allocation: Allocation,
    *,
    rounds: int | None = None,
    schedule: str = "const",
) -> Cost:
    """The cost of all targets.

    Args:
        context: `limit` says how many batches there will be, if `batches` does not.
        settings: of the variant.
        allocation: global or modality-wise.
        rounds: of CHITA++; None for CHITA, where all targets share one set of rows.
        schedule: of CHITA++.

    Raises:
        DataError: if nobody can say how many batches there will be, or there are too few.
        UnsupportedError: if the rows cannot be kept as asked.
        OutputError: if they cannot be kept on the disk.
    """
    p = context.weights.numel
    known = _known_batches(context)
    if known is not None:
        check_enough(known, settings, rounds or 1)
    batches = _batches(known, settings)
    held = settings.held_out_of(batches)
    n = settings.rows or max(1, (batches - held) // (rounds or 1))
    work = _work(context, settings, allocation, rounds or 1, schedule)
    gatherings = len(context.targets) * rounds if rounds else 1
    plan = plan_rows(
        Columns.of(context.weights, settings.columns_of_block),
        n,
        context.memory_budget,
        context.workplace,
        settings.dtype,
        -(-work.sweeps // gatherings),
        keep_in=settings.keep_in,
        device=next(context.model.parameters()).device,
    )
    state = bytes_of_state(context.model, context.adapter)
    stage = 5 * p + state if rounds else 0  # values and support, and what the losses change
    files = len(context.targets) * stage if context.workplace else 0
    part = n * max(b - a for group in plan.cuts for own in group for a, b in pairwise(own))
    ram = plan.ram_bytes + 4 * (_VECTORS * p + _PART_COPIES * part) + (3 * stage if rounds else 0)
    forwards = held * (work.solves + 1) if held else 0
    timed = SolverTime.measured(
        settings.effort,
        n,
        settings.columns_of_block,
        settings.first_order_of(1),
        work.density,
        plan.device,
    )
    reading = work.sweeps * plan.disk_bytes / _DISK_RATE
    return Cost(
        ram_bytes=ram,
        disk_bytes=plan.disk_bytes + files,
        passes=plan.passes * gatherings,
        gradient_batches=plan.gradient_batches * gatherings + math.ceil(forwards / 3),
        seconds=work.solves * timed.seconds(p) + reading,
        notes=(
            *_size_notes(n, p, settings),
            *plan.lines,
            f"effort {settings.effort}: up to {sweeps_of(settings)} sweeps over the rows for a "
            f"solution, {work.solves} solutions in all",
            *_auto_notes(settings, held, work.solves),
            *([f"a disk is taken to read {text_of(_DISK_RATE)} a second"] if reading else []),
        ),
    )


@dataclass(frozen=True)
class _Work:
    """What solvers do for all targets.

    Attributes:
        solves: number of pruned models that are made.
        sweeps: over the rows.
        density: mean fraction of the weights that stay.
    """

    solves: int
    sweeps: int
    density: float


def _work(
    context: Context, settings: Settings, allocation: Allocation, rounds: int, schedule: str
) -> _Work:
    each = sweeps_of(settings)
    solves = sweeps = kept = 0
    p = context.weights.numel
    for target in context.targets:
        for index, level in enumerate(levels_of(target, schedule, rounds)):
            groups = groups_of_weights(
                context.weights, level, allocation, published=context.published
            )
            first = len(GRID) + 2 if settings.first_order else _SOLVES_AROUND
            tries = (_SOLVES_NEARBY if index else first) if settings.auto else 1
            solves += tries
            sweeps += tries * each * len(groups)
            if settings.auto and not settings.first_order and not index:
                sweeps += 1  # for the scale of the rows
            kept += tries * sum(group.keep for group in groups)
    return _Work(solves, sweeps, kept / max(1, solves * p))


def _known_batches(context: Context) -> int | None:
    """How many batches there will be; None if neither the batches nor the limit say it."""
    try:
        known = len(context.batches)  # type: ignore[arg-type]
    except TypeError:
        known = 0
    return min((number for number in (known, context.limit) if number), default=None)


def _batches(known: int | None, settings: Settings) -> int:
    """How many batches there will be; as many as rows if nothing else says it."""
    found = known or settings.rows
    if found is None:
        raise DataError(
            "nobody can say how many batches there will be; give their number (--batches, batches "
            "in a recipe, limit in Python), or rows"
        )
    return found


def sweeps_of(settings: Settings) -> int:
    """The most sweeps over the rows that one solve takes."""
    step = 2 if settings.first_order else 0  # the published gradient step from the dense weights
    if settings.columns_of_block is not None:
        return 1 + step
    return _SWEEPS[settings.effort] + (step if settings.effort == "published" else 0)


def _size_notes(n: int, p: int, settings: Settings) -> list[str]:
    size = settings.dtype.itemsize
    notes = [
        f"{n} rows of {p:,} gradients in {settings.row_dtype}: {text_of(n * p * size)} "
        f"({n * p * size / 1e9:.0f} GB)"
    ]
    if n != _PAPER_ROWS:
        whole = _PAPER_ROWS * p * 4
        notes.append(
            f"with the {_PAPER_ROWS} rows of the paper in float32 it would be {text_of(whole)} "
            f"({whole / 1e9:.0f} GB)"
        )
    return notes


def _auto_notes(settings: Settings, held: int, solves: int) -> list[str]:
    if not settings.auto:
        return []
    return [
        f"lambda=auto makes at least {solves} pruned models, and judges them by the loss on {held} "
        "held-out batches (a forward counts as a third of a gradient)"
    ]
