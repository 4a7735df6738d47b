"""DAS: layers whose outputs vary more, within a modality and between them, keep more."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlp_plugins.calibration.amia import cosine_means
from vlp_plugins.calibration.batches import to_device
from vlp_plugins.calibration.outputs import Output, OutputProbe
from vlp_plugins.calibration.selections import VISUAL
from vlp_plugins.calibration.tokens import check_reached, modules_using
from vlp_plugins.models.adapter import TokenKind
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.distributed import failing_together
from vlp_plugins.runtime.errors import NonFiniteError
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.scoring.budgets import (
    BudgetAllocation,
    Group,
    batches_of_this_process,
    sum_in_order,
)
from vlp_plugins.scoring.selection import Scored

if TYPE_CHECKING:
    from vlp_plugins.methods.method import Context

logger = logging.getLogger(__name__)

_MEANS = 3


@dataclass(frozen=True)
class Das(BudgetAllocation):
    """DAS of TAMP (Lee et al., Findings of ACL 2025): budgets by how much outputs vary.

    Of every layer the mean cosine of its outputs between visual tokens, between text tokens, and
    between the two; one minus each, added up, is its importance. One forward pass over the data
    measures them. Every tensor is a group of its own. A mean that a layer has no tokens for (of
    text, in a vision tower) counts as the mean of the others.

    Example:
        masks = vlp.prune(model, data, method="multiflow", allocation="das", sparsity=0.6)

    Attributes:
        found: by canonical name the three means, as `das_importance` takes them.
    """

    name: ClassVar[str] = "das"

    def forwards(self, weights: Mapping[str, Weight], batches: int) -> int:
        return 0 if self.measured else batches

    def measure(self, context: Context) -> Das:
        return replace(self, found=measure_similarities(context), factors=None)

    def group_of(self, weight: Weight) -> Group:
        return weight.name, 0

    def importances(self, scored: Scored) -> dict[Group, float]:
        found = self.known(scored.weights)
        values = {name: das_importance(found[name]) for name in scored.weights}
        known = [value for value in values.values() if not math.isnan(value)]
        usual = sum(known) / len(known) if known else 1.0
        return {
            self.group_of(weight): usual if math.isnan(values[name]) else values[name]
            for name, weight in scored.weights.items()
        }


def das_importance(means: Sequence[float | None]) -> float:
    """(1 - v) + (1 - l) + (1 - vl), of the means that are known; NaN if none is.

    Args:
        means: between visual tokens, between text tokens, and between the two; None is unknown.
    """
    known = [1 - mean for mean in means if mean is not None]
    return _MEANS * sum(known) / len(known) if known else math.nan


def measure_similarities(context: Context) -> dict[str, list[float | None]]:
    """The three means of TAMP of every layer's outputs in the dense model, over all samples.

    Args:
        context: of the run.

    Returns:
        By canonical name mean cosines between visual tokens, between text tokens, and between the
        two, as `cosine_means`; None where no sample had any.

    Raises:
        StatisticsError: if a weight was reached by no stream.
        NonFiniteError: if an output holds NaN or infinity and such batches are not skipped, or all
            are.
        BatchError: if an output does not fit the samples or the mask of its tokens.
    """
    weights = context.weights
    users = {
        path: sorted({use.weight for use in uses})
        for path, _, uses in modules_using(context.model, weights)
    }
    only_first = context.resolved_owners == "first"
    device = device_of(context.model)
    probe = OutputProbe(
        context.model, context.adapter, weights, published=context.published, kinds=True
    )
    found: dict[int, list[float]] = {}
    with failing_together(), probe.attached():
        for index, batch in batches_of_this_process(context, context.limit):
            sums = {name: [0.0] * (2 * _MEANS + 1) for name in weights}

            def take(output: Output, index: int = index, sums: Any = sums) -> None:
                means = _means_of(output, index)
                for name in users[output.module]:
                    if only_first and weights[name].owners[0].module != output.module:
                        continue
                    for place, mean in enumerate(means):
                        sums[name][place] += mean[0]
                        sums[name][_MEANS + place] += mean[1]
                    sums[name][-1] += 1

            try:
                probe.run(to_device(batch, device), take)
            except NonFiniteError as error:
                if not context.skip_nonfinite:
                    raise
                logger.warning("left batch %d out: %s", index, error)
            else:
                found[index] = [value for each in sums.values() for value in each]
    totals = iter(all_sums := sum_in_order(found))
    if not all_sums:
        raise NonFiniteError(
            "an output holds NaN or infinity in all batches; look at the checkpoint (weights after "
            "a diverged training), or run in float32"
        )
    by_weight = {name: [next(totals) for _ in range(2 * _MEANS + 1)] for name in weights}
    check_reached(context.adapter, weights, [name for name, each in by_weight.items() if each[-1]])
    return {
        name: [
            each[place] / each[_MEANS + place] if each[_MEANS + place] else None
            for place in range(_MEANS)
        ]
        for name, each in by_weight.items()
    }


def _means_of(output: Output, index: int) -> list[tuple[float, int]]:
    """Sums of `cosine_means` over the samples of a call, and how many samples have each."""
    assert output.kinds is not None
    sums, counts = [0.0] * _MEANS, [0] * _MEANS
    for tokens, kinds in zip(output.tokens, output.kinds, strict=True):
        real = kinds != TokenKind.PADDING
        visual = torch.isin(kinds[real], kinds.new_tensor(VISUAL))
        rows = tokens[real]
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                f"the output of {output.module} holds NaN or infinity in batch {index}; look at "
                "that batch, at the checkpoint, run the model in float32, or leave such batches "
                "out with skip_nonfinite (--skip-nonfinite)"
            )
        for place, mean in enumerate(cosine_means(rows, visual)):
            if not math.isnan(mean):
                sums[place] += mean
                counts[place] += 1
    return list(zip(sums, counts, strict=True))
