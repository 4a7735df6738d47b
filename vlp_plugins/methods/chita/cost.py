"""What a run of CHITA or CHITA++ will need, estimated before it starts."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch

from vlp_plugins.calibration.loss import bytes_of_state
from vlp_plugins.methods.chita.lambdas import AHEAD, GRID
from vlp_plugins.methods.chita.pruner import groups_of_weights
from vlp_plugins.methods.chita.rows.plan import RowPlan
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.setup import check_enough, row_plan, solutions_bytes
from vlp_plugins.methods.chita.solver.elimination import held_bytes
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.solve import Effort, solve
from vlp_plugins.methods.method import Context, Cost
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.schedules import levels_of

_ELEMENTS = 1 << 19
"""Of the rows of the smaller problem that is timed."""
_SOLVES_AROUND = 7
"""Three around the guess, two more where it was a decade off, and half a decade to both sides."""
_SOLVES_NEARBY = 5
"""In later rounds, around the lambda of the round before."""
_STEPS = 3
"""Sweeps of a search for lambda that all targets share: around the guess, beyond, between."""
_PAPER_ROWS = 500
_SWEEPS = {"published": 2, "fast": 6, "best": 27}
"""The most sweeps over the rows that one solve of the full problem takes."""
_VECTORS = 8
"""Of p float32 numbers: the weights, the result, the best so far, and what a solver works on."""
_PART_COPIES = 4
"""Of a part of the rows, in float32, while a solver works on it."""
_DISK_RATE = 10**9
"""Bytes per second."""
_AUTO = (
    "lambda=auto makes at least {} pruned models, and judges them by the loss on {} held-out "
    "batches (a forward counts as a third of a gradient)"
)


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
        DataError: if the number of batches is unknown, or there are too few.
        UnsupportedError: if the rows cannot be kept as asked.
        OutputError: if they cannot be kept on the disk.
    """
    p = context.weights.numel
    known = context.number_of_batches()
    if known is not None:
        check_enough(known, settings, rounds or 1)
    batches = known or settings.rows
    if batches is None:
        raise DataError(
            "nobody can say how many batches there will be; give their number (--batches, batches "
            "in a recipe, limit in Python), or rows"
        )
    held = settings.held_out_of(batches)
    n = settings.rows or max(1, (batches - held) // (rounds or 1))
    settings = settings.for_rows(n)
    solves = sweeps = kept = 0
    for target in context.targets:
        for index, level in enumerate(levels_of(target, schedule, rounds or 1)):
            groups = groups_of_weights(context, level, allocation)
            tries = _tries(settings, index)
            solves += tries
            sweeps += tries * sweeps_of(settings) * len(groups)
            kept += tries * sum(group.keep for group in groups)
    gatherings = len(context.targets) * rounds if rounds else 1
    if settings.columns_of_block is not None:  # all are solved together
        sweeps = sweeps_of(settings) * gatherings
    plan = row_plan(context, settings, n, -(-sweeps // gatherings))
    made, held_solutions = solves, 0  # more than are judged where each sweep takes gradients again
    if settings.auto and plan.groups > 1:
        made = max(solves, gatherings * (AHEAD + GRID.last + 1))
        held_solutions = solutions_bytes(context, settings)
    elif settings.auto:
        sweeps *= _STEPS
    state = bytes_of_state(context.model, context.adapter)
    stage = 5 * p + state if rounds else 0  # values and support, and what the losses change
    files = len(context.targets) * stage if context.workplace else 0
    part = n * max(b - a for group in plan.cuts for own in group for a, b in pairwise(own))
    ram = plan.ram_bytes + 4 * (_VECTORS * p + _PART_COPIES * part) + (3 * stage if rounds else 0)
    ram += held_solutions
    if settings.effort == "fast" and plan.needs.columns.bounds is not None:
        ram += held_bytes(n, len(plan.needs.columns.bounds) - 1, len(groups))
    forwards = held * (solves + 1) if held else 0
    solving = solve_seconds(settings, plan, kept / max(1, solves * p))
    reading = sweeps * plan.disk_bytes / _DISK_RATE
    return Cost(
        ram_bytes=ram,
        disk_bytes=plan.disk_bytes + files,
        passes=plan.passes * gatherings,
        gradient_batches=plan.gradient_batches * gatherings + math.ceil(forwards / 3),
        seconds=made * solving + reading,
        notes=(
            *_size_notes(n, p, settings),
            *plan.lines,
            f"effort {settings.effort}: up to {sweeps_of(settings)} sweeps over the rows for a "
            f"solution, {made} solutions in all",
            *([_AUTO.format(solves, held)] if settings.auto else []),
            *([f"a disk is taken to read {text_of(_DISK_RATE)} a second"] if reading else []),
        ),
    )


def _tries(settings: Settings, index: int) -> int:
    """Pruned models that are made in a round, the first of which is 0."""
    if not settings.auto:
        return 1
    if index:
        return _SOLVES_NEARBY
    return len(GRID.steps) + 2 if settings.first_order else _SOLVES_AROUND


def solve_seconds(settings: Settings, plan: RowPlan, density: float) -> float:
    """Seconds of one solve, by a straight line through random problems of two smaller sizes.

    They take at most about two and four megabytes, or one and two blocks.

    Args:
        settings: of the solver.
        plan: of the rows.
        density: fraction kept.
    """
    block_size, n = settings.columns_of_block, plan.needs.n
    block = block_size or 1
    small = max(1, min(_ELEMENTS // n, plan.needs.columns.p // 2) // block) * block
    times = []
    for p in (small, small, 2 * small):  # the first warms up
        draw = torch.Generator().manual_seed(0)
        bounds = None if block_size is None else tuple(range(0, p + 1, block))
        rows = MemoryRows(torch.randn(n, p, generator=draw).to(plan.device), bounds)
        weights = torch.randn(p, generator=draw).to(plan.device)
        first_order = settings.first_order_of(1)
        problem = Problem(weights, rows, 1.0, int(density * p), first_order, bounds)
        times.append(_seconds(problem, settings.effort))
    _, one, two = times
    slope = max(two - one, two / 4) / small
    return max(0.0, two - slope * 2 * small) + slope * plan.needs.columns.p


def _seconds(problem: Problem, effort: Effort) -> float:
    start = time.perf_counter()
    solve(problem, effort)
    return time.perf_counter() - start


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
