"""The rows of a model: gradients of batches, kept where the plan says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.rows.columns import Columns
from vlp_plugins.rows.disk import FileStore
from vlp_plugins.rows.entries import Entries
from vlp_plugins.rows.filling import Filler, Progress
from vlp_plugins.rows.kept import GradientRows, KeptRows, Store
from vlp_plugins.rows.layout import Layout
from vlp_plugins.rows.memory import MemoryStore
from vlp_plugins.rows.needs import RowPlan
from vlp_plugins.rows.passes import PassRows
from vlp_plugins.rows.plan import plan_rows
from vlp_plugins.runtime.distributed import failing_together, rank_and_size
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import text_of

logger = logging.getLogger("vlp_plugins.rows")


@contextmanager
def gradient_rows(
    probe: LossProbe,
    columns: Columns,
    batches: Callable[[], Iterator[Batch]],
    device: torch.device,
    *,
    n: int,
    budget: int | None,
    keep_in: str = "auto",
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    alive: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[GradientRows]:
    """One row per batch: the gradient of its loss by every prunable weight.

    In a process group every process runs some of the batches and holds some of the columns; all
    must be given the same batches. What rows take is given back at the end, whatever happens.

    Args:
        probe: of the model.
        columns: of its weights.
        batches: starts a pass over the batches, always the same ones.
        device: of the model.
        n: number of batches to use.
        budget: bytes of memory for rows; None: most of what is free.
        keep_in: `ram`, `disk`, `passes` (nowhere: the batches run again for every group of columns
            and sweep), or `auto`: the first of them that fits.
        folder: where a file may go; None: `TMPDIR` or /var/tmp.
        dtype: float32, or bfloat16 for half of the memory and an error that is logged.
        alive: bool masks by canonical name; gradients of removed weights are 0. None: no mask.
        progress: called with (batches run, batches to run, or None where the sweeps are not
            known).

    Yields:
        The rows. There are fewer than `n` if the probe skips batches that are not finite.

    Raises:
        UnsupportedError: if the budget is too small, with the least that will do.
        OutputError: if the disk has no room.
        DataError: if there are fewer batches than `n`.
        NonFiniteError: if a loss or gradient is NaN or infinite; names batch and weight.
    """
    plan = plan_rows(columns, n, budget, folder, dtype, keep_in=keep_in, device=device)
    logger.info("%s", plan.lines[0])
    total = None if plan.groups > 1 else n
    entries = Entries(columns, device, alive)
    filler = Filler(probe, entries, batches, n, dtype, progress, total)
    with ExitStack() as stack:
        rows = _gathered(plan, filler, stack)
        stack.callback(rows.release)
        if filler.left_out:
            logger.warning("%d of %d batches gave no row", len(filler.left_out), n)
        if dtype != torch.float32:
            logger.info("keeping rows in %s changes them by %.2g", dtype, rows.rounding)
        yield rows


def _gathered(plan: RowPlan, filler: Filler, stack: ExitStack) -> GradientRows:
    """The rows, those of the first group at least."""
    own = rank_and_size()[0]
    if plan.keep_in == "passes":
        largest = max(Layout(filler.n, group[own]).elements for group in plan.cuts)
        flat = _memory(largest, filler.dtype, plan.device)
        return PassRows(filler, plan.cuts, plan.edges, flat)
    layout = Layout(filler.n, plan.cuts[0][own])
    with failing_together():
        store = _store(plan, layout, filler.dtype, stack)
    filler.run(store, [(cuts[0], cuts[-1]) for cuts in plan.cuts[0]])
    device = filler.entries.device
    rounding = filler.rounding.relative(device)
    return KeptRows(store, filler.rows, plan.edges, device, rounding)


def _store(plan: RowPlan, layout: Layout, dtype: torch.dtype, stack: ExitStack) -> Store:
    if plan.keep_in == "ram":
        return MemoryStore(layout, _memory(layout.elements, dtype, plan.device))
    store = FileStore(layout, dtype, plan.folder)
    stack.callback(store.close)
    return store


def _memory(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError as error:
        amount = text_of(elements * dtype.itemsize)
        raise UnsupportedError(
            f"the system does not give {amount} of memory on {device} for gradient rows; give a "
            "smaller memory_budget"
        ) from error
