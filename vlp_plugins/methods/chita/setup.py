"""What one run of CHITA works with, and how it gets rows, solutions and masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.batches import Calibration, Seen
from vlp_plugins.methods.chita.held_out import HeldOut
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.solving import Pruner
from vlp_plugins.methods.context import Context
from vlp_plugins.rows.columns import Columns
from vlp_plugins.rows.gathering import gradient_rows
from vlp_plugins.rows.plan import plan_rows
from vlp_plugins.runtime.distributed import check_same
from vlp_plugins.runtime.sharding import OnDemand, whole
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import Factors

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
        batches: Seen,
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
            check_same(batches.digest.hex()[:16], f"{len(batches.sizes)} batches")
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
