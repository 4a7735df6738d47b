"""One target: lambda as given or as chosen, the solver's weights, and masks with new values."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.lambdas import (
    GRID,
    OF_MEAN_SQUARE,
    HeldOut,
    choose_lambda,
    curve_text,
    grid_around,
)
from vlp_plugins.methods.chita.pruner import Group, Pruner, dense_again, write_values
from vlp_plugins.methods.chita.rows.stores import GradientRows
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.methods.chita.solver.problem import Solution
from vlp_plugins.models.request import Target

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class Found:
    """A pruned model and how it came about.

    Attributes:
        solution: values and support `[p]`, and the objective.
        facts: lambda, objective and the like, as JSON can keep them.
    """

    solution: Solution
    facts: dict[str, Any]


def find(
    setup: Setup,
    pruner: Pruner,
    groups: Sequence[Group],
    target: str,
    near: float | None = None,
) -> Found:
    """Solves with the lambda given, or with that of the lowest held-out loss.

    Args:
        setup: of the run.
        pruner: rows of the model as it is now.
        groups: say how many weights stay.
        target: what to call it in the log.
        near: a lambda that was best for a similar problem, to look around it only; None: anywhere.

    Raises:
        NonFiniteError: if lambda is to be chosen, and no pruned model has a finite loss.
    """
    facts: dict[str, Any] = {}
    if setup.held_out is None:
        facts["lambda"] = float(setup.settings.lambda_)
        solution = pruner.prune(groups, facts["lambda"])
    else:
        solution, facts = _chosen(setup, setup.held_out, pruner, groups, target, near)
    facts["objective"] = solution.objective
    facts["rows"] = pruner.rows.n
    facts["rows_kept_in"] = pruner.kept_in
    facts["sweeps"] = pruner.rows.sweeps
    if isinstance(pruner.rows, GradientRows) and pruner.rows.rounding:
        facts["rows_rounding"] = pruner.rows.rounding
    return Found(solution, facts)


def _chosen(
    setup: Setup,
    held_out: HeldOut,
    pruner: Pruner,
    groups: Sequence[Group],
    target: str,
    near: float | None,
) -> tuple[Solution, dict[str, Any]]:
    weights = setup.context.weights
    dense = setup.columns.split(pruner.dense)

    def loss(solution: Solution) -> float:
        # Dense again before the next lambda: rows that are kept nowhere are gradients taken anew.
        with dense_again(weights, dense):
            write_values(weights, setup.columns.split(solution.values))
            return held_out.mean_loss()

    choice = choose_lambda(lambda ridge: pruner.prune(groups, ridge), loss, _grid(pruner, near))
    logger.info("%s", curve_text(choice, target))
    for warning in choice.warnings:
        logger.warning("sparsity %s: %s", target, warning)
    facts = {
        "lambda": choice.lambda_,
        "lambda_curve": [[ridge, _plain(value)] for ridge, value in choice.curve],
        "lambda_warnings": list(choice.warnings),
        "held_out_loss": choice.loss,
        "held_out_loss_dense": held_out.dense,
        "held_out_batches": len(setup.calibration.held_out),
    }
    return choice.found, facts


def _grid(pruner: Pruner, near: float | None) -> Sequence[float]:
    """Around a lambda that was good before, or around the scale of the rows.

    With a first-order term lambda weighs that term against staying near the dense weights: its best
    value has nothing to do with the scale of the rows, so the grid is that of the papers.
    """
    if near is not None:
        return grid_around(near)
    if pruner.first_order:
        return GRID
    return grid_around(OF_MEAN_SQUARE * pruner.mean_square())


def _plain(loss: float) -> float | str:
    """JSON has neither NaN nor infinity."""
    return loss if math.isfinite(loss) else str(loss)


def masks_of(
    setup: Setup,
    found: Found,
    target: Target,
    method: str,
    calibration: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Masks:
    """Masks of the support, with the values of what stays.

    Args:
        setup: of the run.
        found: the last solution.
        target: what was asked for.
        method: its name.
        calibration: what `calibration_record` says.
        more: parameters beside those of the settings.
    """
    context = setup.context
    parameters = {
        **setup.settings.parameters(),
        **(more or {}),
        **found.facts,
        **(setup.factors.record() if setup.factors else {}),
        **setup.allocation.record(),
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
        setup.columns.split(found.solution.support),
        manifest,
        setup.columns.split(found.solution.values),
    )


def calibration_record(digests: Sequence[str], sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Which batches made rows.

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
