"""Where rows will be kept, decided and explained before the first batch runs."""

from __future__ import annotations

from pathlib import Path

import torch

from vlp_plugins.rows.columns import Columns
from vlp_plugins.rows.cutting import PART, groups_of
from vlp_plugins.rows.needs import Needs, RowPlan
from vlp_plugins.runtime.distributed import all_reduce_min
from vlp_plugins.runtime.errors import DataError, OutputError, UnsupportedError, suggest
from vlp_plugins.runtime.memory import local_processes, spill_folder, text_of, usable_disk


def plan_rows(
    columns: Columns,
    n: int,
    budget: int | None,
    folder: Path | None,
    dtype: torch.dtype,
    sweeps: int = 1,
    *,
    keep_in: str = "auto",
    device: torch.device | None = None,
) -> RowPlan:
    """The fastest way to keep rows within the budget: in memory, on disk, or in several passes.

    Args:
        columns: of the rows.
        n: number of rows, one batch each.
        budget: bytes of memory for rows and the parts in work; None: three quarters of what is
            free, less what else will be needed.
        folder: where a file may go; None: `TMPDIR` or /var/tmp.
        dtype: float32 or bfloat16.
        sweeps: how often all columns will be read.
        keep_in: `auto`, or what to do.
        device: of the model; rows that fit are kept in its memory.

    Raises:
        UnsupportedError: if the budget is too small, with the least that will do.
        OutputError: if rows must go to a disk that has no room for them.
        DataError: if there are no rows.
    """
    _check(n, dtype, keep_in)
    needs = Needs(columns, n, dtype, sweeps, device or torch.device("cpu"))
    ways = {"ram": _in_memory, "disk": _on_disk, "passes": _in_passes}
    folder = spill_folder(folder)
    errors: list[Exception] = []
    for way, plan in ways.items():
        if keep_in in (way, "auto"):
            try:
                return plan(needs, budget, folder).because(errors)
            except (UnsupportedError, OutputError) as error:
                errors.append(error)
    raise errors[-1]


def _check(n: int, dtype: torch.dtype, keep_in: str) -> None:
    if n < 1:
        raise DataError(f"{n} gradient rows were asked for; there must be at least one batch")
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"rows are float32 or bfloat16, not {str(dtype).split('.')[-1]}")
    known = ["auto", "ram", "disk", "passes"]
    if keep_in not in known:
        raise UnsupportedError(f"keep_in={keep_in!r} is unknown{suggest(keep_in, known)}")


def _in_memory(needs: Needs, budget: int | None, folder: Path) -> RowPlan:
    devices = dict.fromkeys((needs.device, torch.device("cpu")))
    least = needs.rows + needs.extra * needs.block
    for device in devices:
        usable = needs.usable(budget, device)
        if least > usable:
            continue
        spare = (usable - needs.rows) // needs.extra if needs.extra else PART
        cuts = needs.cuts(spare)
        ram = needs.rows + needs.extra * needs.widest(cuts)
        where = "RAM" if device.type == "cpu" else f"the memory of {device}"
        return needs.plan(
            "ram", device, folder, (cuts,), ram, 0,
            f"the rows stay in {where}: {text_of(ram)} of {text_of(usable)}",
        )  # fmt: skip
    raise UnsupportedError(
        f"{needs.n} rows of {needs.columns.p:,} columns need {text_of(least)} of memory, but "
        f"{_of(budget, usable)}; give memory_budget={_amount(least)!r} or more, take fewer rows, "
        "or let them go to disk (keep_in='auto')"
    )


def _on_disk(needs: Needs, budget: int | None, folder: Path) -> RowPlan:
    cpu = torch.device("cpu")
    each = needs.size + needs.extra
    usable = needs.usable(budget, cpu)
    _check_block(needs, each, budget, usable)
    free = all_reduce_min(usable_disk(folder))
    if needs.rows > free:
        raise OutputError(
            f"{needs.n} rows of {needs.columns.p:,} columns need {text_of(needs.rows)} of disk, "
            f"but {folder} has room for {text_of(free)}; choose another folder (the job's work "
            "folder, or TMPDIR), raise memory_budget so that they fit into memory, or say "
            "keep_in='passes', which needs no disk and more time"
        )
    cuts = needs.cuts(usable // (8 * each))
    ram = each * needs.widest(cuts)
    together = needs.rows * local_processes()
    return needs.plan(
        "disk", cpu, folder, (cuts,), ram, needs.rows,
        f"the rows go to disk: {text_of(together)} in {folder}, read once per sweep, "
        f"{text_of(ram)} at a time",
    )  # fmt: skip


def _in_passes(needs: Needs, budget: int | None, folder: Path) -> RowPlan:
    usable = needs.usable(budget, needs.device)
    _check_block(needs, needs.size + needs.extra, budget, usable)
    cuts = needs.cuts(usable // (8 * needs.size))
    extra = needs.extra * needs.widest(cuts)
    columns = (usable - extra) // (needs.n * needs.size)
    groups = groups_of(cuts, columns)
    largest = max(own[-1] - own[0] for group in groups for own in group)
    ram = needs.n * needs.size * largest + extra
    how = f"{len(groups)} groups of columns one after the other in {text_of(ram)}"
    line = f"the rows are kept nowhere: {how}, so every sweep runs all {needs.n} batches again, "
    line += f"{len(groups)} times"
    if len(groups) == 1:
        line = f"the rows are one group of columns that stays in memory: {text_of(ram)}"
    return needs.plan("passes", needs.device, folder, groups, ram, 0, line)


def _check_block(needs: Needs, each: int, budget: int | None, usable: int) -> None:
    least = each * needs.block
    if usable < least:
        raise UnsupportedError(
            f"{needs.n} rows of the largest block ({needs.block // needs.n:,} columns) take "
            f"{text_of(least)}, but {_of(budget, usable)}; give memory_budget={_amount(least)!r} "
            "or more, take fewer rows or smaller blocks"
        )


def _of(budget: int | None, usable: int) -> str:
    if budget is None:
        return f"only {text_of(usable)} of what is free may be used"
    return f"the budget is {text_of(budget)}"


def _amount(least: int) -> str:
    """An amount that is at least that many bytes, as people write it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if least >= size:
            tenths = -(-least * 10 // size)
            return f"{tenths / 10:g}{unit}"
    return f"{least}B"
