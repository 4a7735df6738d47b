"""One run: its batches, rows, held-out loss, a lambda for every target, and the masks."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from vlp_plugins.calibration.batches import batches_again
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.lambdas import (
    AHEAD,
    GRID,
    OF_MEAN_SQUARE,
    Choice,
    Grid,
    HeldOut,
    choose_lambdas,
    curve_text,
)
from vlp_plugins.methods.chita.pruner import (
    Group,
    Pruner,
    dense_again,
    packed_bytes,
    write_values,
)
from vlp_plugins.methods.chita.rows.gradients import GradientRows, Progress, gradient_rows
from vlp_plugins.methods.chita.rows.plan import Columns, RowNeeds, RowPlan
from vlp_plugins.methods.chita.settings import MOST_HELD_OUT, Settings
from vlp_plugins.methods.chita.solver.problem import Solution
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.rounds import RecordedBatches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.distributed import check_same
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.runtime.sharding import OnDemand
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import Factors

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class Calibration:
    """The calibration batches of a run, divided.

    Attributes:
        again: starts a pass over all of them.
        available: how many of the first ones may make rows.
        rows: how many make those of a round.
        held_out: the last ones, on the CPU; they never make rows.
    """

    again: Callable[[], Iterator[Batch]]
    available: int
    rows: int
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
            total, held = _read(again, settings, rounds)
        check_enough(total, settings, rounds)
        available = total - len(held)
        rows = settings.rows or max(1, available // rounds)
        if rows * rounds > available:
            logger.warning(
                "%d rounds of %d batches are more than the %d there are: after the last batch "
                "comes the first again",
                rounds,
                rows,
                available,
            )
        return cls(again, available, rows, tuple(held))

    def of_round(self, index: int) -> Callable[[], Iterator[Batch]]:
        """The batches of a round, fresh ones as far as there are: the first follows the last."""

        def batches() -> Iterator[Batch]:
            first, left = index * self.rows % self.available, self.rows
            while left > 0:
                read = 0
                for batch in islice(self.again(), first, min(self.available, first + left)):
                    read += 1
                    yield batch
                if not read:
                    return  # the data ended early: what counts the rows complains
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
    again: Callable[[], Iterator[Batch]], settings: Settings, rounds: int
) -> tuple[int, tuple[Batch, ...]]:
    """Counts the batches, as far as rounds read them, and holds on to the last ones."""
    if not settings.auto:
        most = None if settings.rows is None else settings.rows * rounds
        return sum(1 for _ in islice(again(), most)), ()
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
        others = f" next to the {held} held out for lambda=auto" if held else ""
        raise DataError(
            f"rows={settings.rows} needs as many batches, but there are {total - held}{others}; "
            "give more batches or ask for fewer rows"
        )


def calibration_record(digests: Sequence[str], sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the manifest says about the batches that made rows.

    Args:
        digests: by round, the hash of its batches, hexadecimal.
        sizes: by round, the number of samples of each of its batches.
    """
    together = digests[0]
    if len(digests) > 1:
        together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {
        "fingerprint": together[:16],
        "batches": sum(map(len, sizes)),
        "samples": sum(map(sum, sizes)),
        "tokens": "as the loss reads them",
    }


def solutions_bytes(context: Context, settings: Settings) -> int:
    """Of all solutions that are held where lambdas are tried without reading rows again."""
    if not settings.auto or settings.columns_of_block is None:
        return 0
    sparsities = [t.values() if isinstance(t, Mapping) else (t,) for t in context.targets]
    p = context.weights.numel
    largest = packed_bytes(p, int((1 - min(map(min, sparsities))) * p), settings.first_order_of(1))
    return len(sparsities) * (AHEAD + GRID.last + 1) * largest


def row_plan(context: Context, settings: Settings, n: int, sweeps: int = 1) -> RowPlan:
    """Where n rows of a run are kept; all of them will be read `sweeps` times."""
    needs = RowNeeds(
        Columns.of(context.weights, settings.columns_of_block),
        n,
        context.memory_budget,
        context.workplace,
        settings.dtype,
        sweeps,
        settings.keep_in,
        device_of(context.model),
        solutions_bytes(context, settings),
    )
    return needs.plan()


@dataclass(frozen=True)
class Pruned:
    """A solution and how it came about.

    Attributes:
        solution: values and support `[p]`, and the objective.
        facts: lambda, objective and the like, as JSON can keep them.
    """

    solution: Solution
    facts: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What to solve for.

    Attributes:
        groups: say how many weights stay.
        title: what to call it in the log.
        near: a lambda that was best for a similar problem, to look around it only; None: anywhere.
    """

    groups: Sequence[Group]
    title: str
    near: float | None = None


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
        """Divides the batches and runs the dense model on the held-out ones.

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
        settings = settings.for_rows(calibration.rows)
        columns = Columns.of(context.weights, settings.columns_of_block)
        probe = context.loss_probe()
        return cls(context, settings, allocation, calibration, columns, probe, held_out, factors)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return device_of(self.context.model)

    @contextmanager
    def pruner(
        self,
        batches: RecordedBatches,
        alive: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Pruner]:
        """Gathers rows at the weights as they are now.

        Args:
            batches: for the rows of a round.
            alive: bool masks by canonical name; what they remove stays removed. None: nothing.
            progress: called with (batches done, batches in all).

        Raises:
            VlpError: if the loss or a gradient is not finite, memory or batches do not suffice.
        """
        context, settings, weights = self.context, self.settings, self.context.weights
        # Those that are sharded are gathered one by one (a collective).
        values = OnDemand(weights, lambda name: weights[name].values.float())
        plan = row_plan(context, settings, self.calibration.rows)
        with gradient_rows(self.probe, plan, batches, alive=alive, progress=progress) as rows:
            check_same(batches.digest[:16], f"{len(batches.sizes)} batches")
            if alive is None and settings.first_order is True and batches.sizes[0] == 1:
                logger.warning(
                    "with batches of one sample the first-order term has weight 1, which can "
                    "destroy a model that is trained well; first_order=false leaves it out, "
                    "batches of more samples weaken it"
                )
            yield Pruner(
                dense=self.columns.join(values),
                rows=rows,
                kept_in=plan.keep_in,
                columns=self.columns,
                effort=settings.effort,
                first_order=settings.first_order_of(batches.sizes[0]),
                nonzero=context.published,
                alive=None if alive is None else self.columns.join(alive),
                factors=self.factors,
            )

    def find(self, pruner: Pruner, wanted: Sequence[Wanted]) -> Iterator[Pruned]:
        """Solves with the lambda given, or with that of the lowest held-out loss.

        Args:
            pruner: has the rows of the model as it is now.
            wanted: what to solve for.

        Yields:
            By what was wanted.

        Raises:
            NonFiniteError: if lambda is to be chosen, and no pruned model has a finite loss.
        """
        if self.held_out is None:
            ridge = float(self.settings.lambda_)
            for found in pruner.solve([(each.groups, ridge) for each in wanted]):
                yield self._pruned(pruner, found(), {"lambda": ridge})
            return
        # One after the other, unless that costs reading the rows more often.
        for some in [wanted] if pruner.together else [[each] for each in wanted]:
            choices = self._choices(self.held_out, pruner, some)
            for each, choice in zip(some, choices, strict=True):
                facts = self._facts_of(self.held_out, choice, each.title)
                yield self._pruned(pruner, choice.found(), facts)

    def _pruned(self, pruner: Pruner, solution: Solution, facts: dict[str, Any]) -> Pruned:
        facts["objective"] = solution.objective
        facts["rows"] = pruner.rows.n
        facts["rows_kept_in"] = pruner.kept_in
        facts["sweeps"] = pruner.rows.sweeps
        if isinstance(pruner.rows, GradientRows) and pruner.rows.rounding:
            facts["rows_rounding"] = pruner.rows.rounding
        return Pruned(solution, facts)

    def _choices(
        self, held_out: HeldOut, pruner: Pruner, wanted: Sequence[Wanted]
    ) -> list[Choice[Callable[[], Solution]]]:
        """The best lambda of each."""
        weights, dense = self.context.weights, self.columns.split(pruner.dense)

        def loss(found: Callable[[], Solution]) -> float:
            values = self.columns.split(found().values)
            # Dense again before the next lambda: rows kept nowhere are gradients taken again.
            with dense_again(weights, dense):
                write_values(weights, values)
                return held_out.mean_loss()

        return choose_lambdas(
            lambda jobs: pruner.solve([(wanted[index].groups, ridge) for index, ridge in jobs]),
            loss,
            [_grid(pruner, each.near) for each in wanted],
            ahead=pruner.room([each.groups for each in wanted]) if pruner.dear else 0,
        )

    def _facts_of(
        self, held_out: HeldOut, choice: Choice[Callable[[], Solution]], title: str
    ) -> dict[str, Any]:
        """Says how lambda was chosen."""
        logger.info("%s", curve_text(choice, title))
        for warning in choice.warnings:
            logger.warning("sparsity %s: %s", title, warning)
        return {
            "lambda": choice.lambda_,
            # JSON has neither NaN nor infinity.
            "lambda_curve": [
                [ridge, value if math.isfinite(value) else str(value)]
                for ridge, value in choice.curve
            ],
            "lambda_warnings": list(choice.warnings),
            "held_out_loss": choice.loss,
            "held_out_loss_dense": held_out.dense,
            "held_out_batches": len(self.calibration.held_out),
        }

    def masks_of(
        self,
        pruned: Pruned,
        target: Target,
        method: str,
        calibration: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
    ) -> Masks:
        """Masks of the support, with the values of what stays.

        Args:
            pruned: the last solution.
            target: what was asked for.
            method: its name.
            calibration: see `calibration_record`.
            more: parameters other than the settings.
        """
        context = self.context
        parameters = {
            **self.settings.parameters(),
            **(more or {}),
            **pruned.facts,
            **(self.factors.record() if self.factors else {}),
            **self.allocation.record(),
            "variant": "published" if context.published else "default",
        }
        manifest = Manifest.for_weights(
            context.weights,
            method=method,
            parameters=parameters,
            seed=context.seed,
            sparsity=target,
            calibration=calibration,
        )
        return Masks.from_dense(
            self.columns.split(pruned.solution.support),
            manifest,
            self.columns.split(pruned.solution.values),
        )


def _grid(pruner: Pruner, near: float | None) -> Grid:
    """Around a lambda that was good before, or around the scale of the rows.

    With a first-order term lambda weighs that term against staying near the dense weights: its best
    value has nothing to do with the scale of the rows, so the grid is that of the papers.
    """
    rows = pruner.rows
    if near is not None:
        return Grid(near)
    if pruner.first_order or not isinstance(rows, GradientRows):
        return GRID
    return Grid(OF_MEAN_SQUARE * rows.mean_square)
