"""Calibration batches of CHITA, and what one run works with: rows, held-out loss, pruner."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from vlp_plugins.calibration.batches import batches_again
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.lambdas import HeldOut
from vlp_plugins.methods.chita.pruner import Pruner
from vlp_plugins.methods.chita.rows.gradients import gradient_rows
from vlp_plugins.methods.chita.rows.plan import Columns, plan_rows
from vlp_plugins.methods.chita.settings import MOST_HELD_OUT, Settings
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.rounds import RecordedBatches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import check_same
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.sharding import OnDemand, whole
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import Factors


@dataclass(frozen=True)
class Calibration:
    """The calibration batches of a run, divided.

    Attributes:
        again: starts a pass over all of them.
        available: how many of the first ones may make rows.
        held_out: the last ones, on the CPU; they never make rows.
    """

    again: Callable[[], Iterator[Batch]]
    available: int
    held_out: tuple[Batch, ...] = ()

    @classmethod
    def of(cls, context: Context, settings: Settings, *, rounds: int = 1) -> Calibration:
        """Divides the batches; reads them once if their number is not sure otherwise.

        A loader's length is no more than a guess where records may be skipped.

        Args:
            context: of the run.
            settings: say how many are held out and how many rows are asked for.
            rounds: how many times fresh batches are wanted; above 1 they may start over.

        Raises:
            DataError: if there are no batches, or too few for the rows or the held-out ones.
        """
        batches, limit = context.batches, context.limit
        again = batches_again(batches, limit)
        if isinstance(batches, list | tuple):
            total = len(batches) if limit is None else min(len(batches), limit)
            held = batches[total - settings.held_out_of(total) : total] if settings.auto else ()
        elif iter(batches) is batches and not settings.auto and rounds == 1:
            total, held = _promised(settings, limit), ()
        else:
            total, held = _read(again, settings)
        check_enough(total, settings, rounds)
        return cls(again, total - len(held), tuple(held))

    def from_(self, start: int, count: int) -> Callable[[], Iterator[Batch]]:
        """`count` of the available batches from the one at `start`, over and over again."""

        def batches() -> Iterator[Batch]:
            first, left = start % self.available, count
            while left > 0:
                read = 0
                for batch in islice(self.again(), first, min(self.available, first + left)):
                    read += 1
                    yield batch
                if not read:
                    return  # the data ended early: whoever counts the rows complains
                first, left = 0, left - read

        return batches


def _promised(settings: Settings, limit: int | None) -> int:
    """The number of batches of an iterator, which cannot be counted without being used up."""
    known = [number for number in (settings.rows, limit) if number is not None]
    if not known:
        raise DataError(
            "the batches are an iterator (a generator?) of unknown length, which can be read once; "
            "give a list of batches or a loader, or say how many with limit"
        )
    return min(known)


def _read(
    again: Callable[[], Iterator[Batch]], settings: Settings
) -> tuple[int, tuple[Batch, ...]]:
    """Counts the batches and holds on to the last ones."""
    if not settings.auto:
        return sum(1 for _ in islice(again(), settings.rows)), ()
    most = int(settings.held_out) if settings.held_out >= 1 else MOST_HELD_OUT
    last: deque[Batch] = deque(maxlen=most)
    total = 0
    for batch in again():
        total += 1
        last.append(batch)
    wanted = settings.held_out_of(total)
    return total, tuple(last)[len(last) - min(wanted, len(last)) :]


def check_enough(total: int, settings: Settings, rounds: int) -> None:
    """Makes sure that there are as many batches for gradients as asked for, without those held out.

    Raises:
        DataError: if there are not.
    """
    if not total:
        raise DataError("the calibration data is empty: there is no batch; check its path")
    held = settings.held_out_of(total)
    if held >= total:
        raise DataError(
            f"lambda=auto holds {held} of the batches out and needs others for gradients, but "
            f"there are {total}; give more batches, hold out fewer, or give lambda as a number"
        )
    if rounds == 1 and settings.rows is not None and settings.rows > total - held:
        beside = f" beside the {held} held out for lambda=auto" if held else ""
        raise DataError(
            f"rows={settings.rows} needs as many batches, but there are {total - held}{beside}; "
            "give more batches or ask for fewer rows"
        )


logger = logging.getLogger("vlp_plugins.methods")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Setup:
    """The parts of a run, made once.

    Attributes:
        context: of the run.
        settings: of the variant.
        allocation: global, or by modality.
        calibration: batches for rows, and held-out ones.
        columns: where every weight lies in the rows.
        probe: of the model.
        held_out: what chooses lambda; None if it is given.
        factors: of the weights' importance; None: 1.
    """

    context: Context
    settings: Settings
    allocation: Allocation
    calibration: Calibration
    columns: Columns
    probe: LossProbe
    held_out: HeldOut | None
    factors: Factors | None = None

    @classmethod
    def of(
        cls,
        context: Context,
        settings: Settings,
        allocation: Allocation,
        *,
        rounds: int = 1,
        factors: Factors | None = None,
    ) -> Setup:
        """Divides the batches and looks at the held-out ones.

        Raises:
            VlpError: see `Calibration.of` and `HeldOut`.
        """
        calibration = Calibration.of(context, settings, rounds=rounds)
        held_out = None
        if settings.auto:
            # A probe of its own: that of the rows may be at work when it is asked.
            held_out = HeldOut(
                context.loss_probe(),
                calibration.held_out,
                calibration.available,
                skip_nonfinite=context.skip_nonfinite,
            )
        columns = Columns.of(context.weights, settings.columns_of_block)
        probe = context.loss_probe()
        return cls(context, settings, allocation, calibration, columns, probe, held_out, factors)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.context.model.parameters()).device

    def values(self) -> Mapping[str, torch.Tensor]:
        """The weights as they are now, float32; views of the parameters where they are float32.

        Those that are sharded are gathered when they are asked for (a collective).
        """
        weights = self.context.weights
        return OnDemand(weights, lambda name: whole(weights[name].parameter).float())

    @contextmanager
    def pruner(
        self,
        batches: RecordedBatches,
        count: int,
        alive: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Pruner]:
        """Gathers rows at the weights as they are now.

        Args:
            batches: for the rows.
            count: of the batches.
            alive: bool masks by canonical name; what they remove stays removed. None: nothing.
            progress: called with (batches done, batches in all).

        Raises:
            VlpError: if the loss or a gradient is not finite, memory or batches do not suffice.
        """
        context, settings = self.context, self.settings
        budget, folder = context.memory_budget, context.workplace
        plan = plan_rows(
            self.columns,
            count,
            budget,
            folder,
            settings.dtype,
            keep_in=settings.keep_in,
            device=self.device,
        )
        with gradient_rows(
            self.probe,
            self.columns,
            batches,
            self.device,
            n=count,
            budget=budget,
            keep_in=plan.keep_in,
            folder=folder,
            dtype=settings.dtype,
            alive=alive,
            progress=progress,
        ) as rows:
            check_same(batches.digest[:16], f"{len(batches.sizes)} batches")
            if alive is None and settings.first_order is True and batches.sizes[0] == 1:
                logger.warning(
                    "with batches of one sample the first-order term has weight 1, which can "
                    "destroy a model that is trained well; first_order=false leaves it out, "
                    "batches of more samples weaken it"
                )
            yield Pruner(
                dense=self.columns.join(self.values()),
                rows=rows,
                kept_in=plan.keep_in,
                columns=self.columns,
                effort=settings.effort,
                first_order=settings.first_order_of(batches.sizes[0]),
                nonzero=context.published,
                alive=None if alive is None else self.columns.join(alive),
                factors=self.factors,
            )
